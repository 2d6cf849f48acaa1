"""Text files as numbered lines: line ends, byte order marks, gzip, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import stat
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgr_jax.corpora import files, lines


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_read_numbers_lines_and_strips_line_ends_and_bom(tmp_path, pack):
    path = tmp_path / "a.txt"
    path.write_bytes(pack(b"\xef\xbb\xbfone\r\ntwo\xe2\x80\xa8still two\n\nfour \r"))
    assert list(lines.read(path)) == [(1, "one"), (2, "two\u2028still two"), (3, ""), (4, "four ")]


def test_gzip_is_recognised_by_content_not_by_name(tmp_path):
    (tmp_path / "plain.gz").write_bytes(b"not packed\n")
    assert list(lines.read(tmp_path / "plain.gz")) == [(1, "not packed")]


def test_only_the_first_line_loses_a_bom(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n\xef\xbb\xbfb\n")
    assert list(lines.read(path)) == [(1, "a"), (2, "\ufeffb")]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_names_line_and_byte(tmp_path, bom):
    path = tmp_path / "a.txt"
    path.write_bytes(bom + "é\nab".encode() + b"\xff\n")
    expected = (
        f"{path}, line 2: found invalid UTF-8 (0xff at byte 2 of the line, {len(bom) + 5} of the "
        f"text); expected UTF-8 text"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        list(lines.read(path))


def test_invalid_utf8_on_the_first_line_counts_the_bom(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\xff")
    with pytest.raises(ValueError, match=r"line 1: .* at byte 4 of the line, 4 of the text"):
        list(lines.read(path))


def test_utf16_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("abc\n".encode("utf-16"))
    with pytest.raises(ValueError, match="found a UTF-16 byte order mark; expected UTF-8 text"):
        list(lines.read(path))


def test_truncated_gzip_is_named(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-30])
    with pytest.raises(
        ValueError, match=r"found damaged gzip data after line 0 .* a whole .gz file"
    ):
        list(lines.read(path))


def test_json_objects_pass_over_empty_lines_and_refuse_the_rest(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": \n')
    rows = lines.json_objects(path, "'a'")
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(ValueError, match=r"a.jsonl, line 4: found invalid JSON .* with 'a'"):
        next(rows)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: found a JSON list; expected one JSON object"):
        list(lines.json_objects(path, "'a'"))


RECORDS = st.lists(
    st.dictionaries(
        st.text(max_size=3), st.text(max_size=12) | st.integers() | st.lists(st.text(max_size=4))
    ),
    max_size=6,
)


@given(RECORDS, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_json_array_equals_json_loads_for_any_block(
    tmp_path_factory, records, indent, ascii, block
):
    path = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps(records, indent=indent, ensure_ascii=ascii)
    path.write_bytes(text.encode("utf-8", "replace"))
    expected = json.loads(path.read_bytes())
    assert [record for _, record in lines.json_array(path, block=block)] == expected


def test_json_array_says_where_an_object_starts(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf\n[ {"a": 1},\n\n {"a":\n 2}\n, {"a": 3}]\n')
    assert list(lines.json_array(path, block=3)) == [(2, {"a": 1}), (4, {"a": 2}), (6, {"a": 3})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', r"line 1: found '\{'; expected '\[' and a JSON array"),
        ("", "line 1: found ''; expected '\\[' and a JSON array"),
        ('[{"a": 1}\n', "line 2: found ''; expected ',' or ']' after an object"),
        ('[{"a": 1}\n{"a": 2}]', r"line 2: found '\{'; expected ',' or ']' after an object"),
        ('[\n{"a": 1},\n]', r"line 3: found invalid JSON \(Expecting value\)"),
        ('[\n{"a": 1},\n{"a": "b', r"line 3: found invalid JSON \(Unterminated string"),
        ('[\n{"a"\n: b, "c": "%s"}]' % ("x" * 99), r"line 3: found invalid JSON \(Expecting value"),
        ("[\n3]", "line 2: found a JSON int; expected a JSON object"),
        ("[]\n x", "line 2: found 'x'; expected nothing after the end"),
    ],
)
@pytest.mark.parametrize("block", [2, 1000])
def test_json_array_refuses(tmp_path, text, message, block):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(lines.json_array(path, block=block))


def test_json_array_does_not_read_on_without_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": "' + "b" * 10_000)
    with pytest.raises(
        ValueError, match="line 1: found no end within 100 characters of the object"
    ):
        list(lines.json_array(path, block=16, largest=100))


def test_json_array_names_the_byte_of_invalid_utf8(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[\n{"a": "' + "é".encode() + b'\xff"}]')
    for block in (1, 3, 100):
        with pytest.raises(ValueError, match=r"line 2: .*0xff at byte 9 of the line, 11 of"):
            list(lines.json_array(path, block=block))


def test_csv_rows_unquote_and_number_by_first_line(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('1\t"say ""x""\tor\ny"\n\n2\tplain "as is"\n')
    rows = [(1, ["1", 'say "x"\tor\ny']), (4, ["2", 'plain "as is"'])]
    assert list(lines.csv_rows(path)) == rows


def test_csv_rows_stop_at_a_quote_that_never_ends(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('1\ta\n2\t"' + "many words\n" * 20_000)
    with pytest.raises(ValueError, match="line 2: found a field that cannot be read"):
        list(lines.csv_rows(path))


def test_writing_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with lines.writing(path) as handle:
        handle.write(b"old\n")
    with pytest.raises(RuntimeError), lines.writing(path) as handle:
        handle.write(b"half")
        assert path.read_bytes() == b"old\n"
        raise RuntimeError
    assert path.read_bytes() == b"old\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_writing_gzip_gives_the_same_bytes_each_time(tmp_path):
    for name in ("a.gz", "b.gz"):
        with lines.writing(tmp_path / name) as handle:
            handle.write("é\n".encode() * 1000)
    packed = (tmp_path / "a.gz").read_bytes()
    assert packed == (tmp_path / "b.gz").read_bytes()
    assert gzip.decompress(packed).decode() == "é\n" * 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '1\t"a\t"b\n',
            r"line 1: found a field that cannot be read \('b' behind a closing quote\)",
        ),
        ('1\ta\n2\t"open\n3\tb', r"line 2: found a field that cannot be read \(its quote is not"),
        ('1\t"a" b\t2\n', r"line 1: found a field that cannot be read \(' b\\t2' behind a closing"),
        ("1\ta\rb\n", r"line 1: .* \(a carriage return outside of quotes\)"),
        ('1\ta\t"\n', r"line 1: found a field that cannot be read \(its quote is not closed\)"),
    ],
)
def test_csv_rows_refuse_quotes_that_are_not_closed(tmp_path, text, message):
    path = tmp_path / "a.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(lines.csv_rows(path))


def test_csv_rows_of_one_line_each_see_a_row_that_was_swallowed(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('1\tx\n2\t"open\tA\n3\tnext"\tB\n')
    assert list(lines.csv_rows(path))[1] == (2, ["2", "open\tA\n3\tnext", "B"])
    with pytest.raises(ValueError, match=r"line 2: .* \(its quote is not closed: '2\\t\"open"):
        list(lines.csv_rows(path, tabs_over_lines=False))
    path.write_text('1\t"over\ntwo lines"\n2\t"a\ttab"\n')
    rows = [(1, ["1", "over\ntwo lines"]), (3, ["2", "a\ttab"])]
    assert list(lines.csv_rows(path, tabs_over_lines=False)) == rows


@given(st.lists(st.lists(st.text('ab"\t\n é', max_size=4), min_size=2, max_size=3), max_size=4))
def test_csv_rows_read_what_csv_writes(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.tsv"
    with path.open("w", newline="") as handle:
        csv.writer(handle, delimiter="\t", lineterminator="\n").writerows(rows)
    assert [fields for _, fields in lines.csv_rows(path)] == rows


def test_csv_rows_of_any_length(tmp_path):
    path = tmp_path / "a.tsv"
    long = "x" * 200_000
    path.write_text(f'1\t"{long}""{long}"\n2\t{long}\n')
    assert list(lines.csv_rows(path)) == [(1, ["1", f'{long}"{long}']), (2, ["2", long])]


def test_a_line_without_an_end_costs_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 1 << 16)
    path = tmp_path / "zeros.gz"
    path.write_bytes(gzip.compress(b"ok\n" + bytes(1 << 24)))
    tracemalloc.start()
    for read in (lambda: list(lines.read(path)), lambda: lines.places(path, 10)):
        with pytest.raises(
            ValueError, match=r"zeros.gz, line 2: found no end of the line within 65"
        ):
            read()
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert highest < 1 << 23
    (tmp_path / "fits").write_bytes(b"x" * ((1 << 16) - 1) + b"\n" + b"y" * 9)
    assert [len(text) for _, text in lines.read(tmp_path / "fits")] == [(1 << 16) - 1, 9]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[" * 200_000, "JSON that is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "a whole number of too many digits"),
    ],
)
def test_json_that_python_gives_up_on(tmp_path, text, found):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{text}\n')
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: found {found}; expected one JSON obje"):
        list(lines.json_objects(path, "'a'"))
    path.write_text(f'[\n{{"a": 1}},\n{{"b": {text}}}]')
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: found {found}; expected a JSON array"):
        list(lines.json_array(path))


# Writing to what is no file of its own.


def test_writing_through_a_link_leaves_the_link(tmp_path):
    (tmp_path / "there").mkdir()
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    (tmp_path / "there" / "old").write_text("old")
    link.symlink_to(tmp_path / "there" / "old")
    dangling.symlink_to("there/new")
    for path in (link, dangling):
        with lines.writing(path) as handle:
            handle.write(b"text")
        assert path.is_symlink()
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["new", "old"]
    assert link.read_text() == dangling.read_text() == "text"


def test_writing_to_a_pipe_and_a_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    with lines.writing(pipe) as handle:
        handle.write(b"text")
    reader.join()
    assert got == [b"text"] and stat.S_ISFIFO(pipe.stat().st_mode)
    with lines.writing("/dev/null") as handle:
        handle.write(b"text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_writing_to_a_descriptor_goes_on_where_it_stands(tmp_path, name):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"before ")
        file.flush()
        with lines.writing(name.format(file.fileno())) as handle:
            handle.write(b"text")
        file.write(b" after")
    assert (tmp_path / "file").read_bytes() == b"before text after"


def test_a_pipe_is_read_as_often_as_is_asked(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    feed = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(b"a\nb\n"),))
    feed.start()
    with files.rereadable(pipe):
        for _ in range(2):
            assert list(lines.read(pipe)) == [(1, "a"), (2, "b")]
    feed.join()
