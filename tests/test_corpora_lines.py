"""Text files as numbered lines: line ends, byte order marks, gzip, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgr_jax.corpora import lines


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
