"""Generation examples made by the workers of an Apache Beam pipeline. The only home of Beam."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Callable, Iterable
from functools import partial

from dgr_jax.data.examples import Part
from dgr_jax.experiments.stage import Stage
from dgr_jax.stages import prepare
from dgr_jax.stages.generation_data import Work

logger = logging.getLogger(__name__)


def check() -> None:
    """Raises ImportError where Apache Beam is not installed."""
    try:
        import apache_beam  # noqa: F401
    except ImportError:
        raise ImportError(
            "--beam_options needs the extra 'dgr_jax[beam]': pip install 'dgr_jax[beam]'"
        ) from None


def everywhere(options: str) -> Callable[[Stage], Stage]:
    """For `pipeline.run`: the stage prepare writes its examples by `write_parts`."""
    make = partial(prepare.prepare, everywhere=partial(write_parts, options=options))

    def changed(stage: Stage) -> Stage:
        if stage is not prepare.STAGE:
            raise ValueError(
                "--beam_options: got a dense retriever, expected an experiment that writes "
                "identifiers: workers make its examples, and a dense retriever has none"
            )
        check()
        return dataclasses.replace(stage, make=make)

    return changed


def write_parts(work: Work, parts: Iterable[Part], options: str = "") -> None:
    """Calls work.write_part on every part, and returns when all are written.

    options: Beam's flags in one line, such as '--runner=DirectRunner --direct_num_workers=2'; the
    runner decides where workers are, and must let them see `work.folder`.
    """
    check()
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    parts = list(parts)
    logger.info("prepare: %d parts for Apache Beam %s", len(parts), options)
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        shuffled = pipeline | beam.Create(parts) | beam.Reshuffle()
        shuffled | beam.Map(work.write_part)
