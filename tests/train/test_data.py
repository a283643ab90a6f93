"""Text sources, their refusals, the split and the token blocks."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hang import HANG_SECONDS
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from darkformer import InputError, MissingExtraError
from darkformer.hf.load import demo_model_path, load_tokenizer
from darkformer.train import data, installed_text
from darkformer.train.data import (
    LargeText,
    blocks_of,
    load_documents,
    load_texts,
    prefix_of,
    pydoc_documents,
    read_file,
    split_documents,
    text_size,
    token_blocks,
    tokens_of,
)


def test_files_and_globs_in_order(tmp_path: Path) -> None:
    for name, text in [("b.txt", "second"), ("a.txt", "first"), ("c.md", "third é")]:
        (tmp_path / name).write_text(text, "utf-8")
    assert load_documents([str(tmp_path / "*.txt"), str(tmp_path / "c.md")]) == ["first", "second", "third é"]


def test_recursive_globs(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").write_text("found", "utf-8")
    assert load_documents([str(tmp_path / "**" / "*.txt")]) == ["found"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home", "utf-8")
    assert load_documents(["~/a.txt"]) == ["at home"]


def test_a_name_with_the_characters_of_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("text", "utf-8")
    assert load_documents([str(tmp_path / "a[1].txt")]) == ["text"]


def test_pydoc_is_there_and_always_the_same() -> None:
    documents = pydoc_documents()
    assert documents == pydoc_documents() == load_documents(["pydoc"])
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000
    assert any('The "with" statement' in document for document in documents)


class TestDocstrings:
    LONG = "A sentence that is long enough to count as text, because labels of a few words are not documentation."

    def test_of_modules_classes_and_functions(self) -> None:
        lines = [
            f'"""{self.LONG}"""',
            "class A:",
            f'    """{self.LONG} A"""',
            "    def f(self):",
            "        'short'",
            "        def g():",
            f'            "{self.LONG} g"',
        ]
        source = "\n".join(lines)
        assert installed_text.module_docstrings(source.encode()) == [self.LONG, f"{self.LONG} A", f"{self.LONG} g"]

    @pytest.mark.parametrize("source", [b"def f(:", b"x = '\x00'", b"# coding: nonsense\n"])
    def test_what_cannot_be_parsed_has_none(self, source: bytes) -> None:
        assert installed_text.module_docstrings(source) == []

    def test_one_document_a_module_each_text_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "tests").mkdir()
        for name, text in [("b.py", "b"), ("a.py", "a"), ("copy.py", "a"), ("tests/t.py", "t")]:
            (tmp_path / name).write_text(f'"""{self.LONG} {text}"""')
        monkeypatch.setattr(installed_text, "PACKAGES", ())
        monkeypatch.setattr(installed_text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        documents = load_documents(["python"])
        assert documents == [*pydoc_documents(), f"{self.LONG} a", f"{self.LONG} b"]


class TestLargeFiles:
    """Files that are read piece by piece are the same text and the same tokens."""

    @pytest.fixture
    def text(self) -> str:
        return "".join(pydoc_documents()[:20]) + "\nÄ 汉字 🦀 " * 2000

    @pytest.fixture
    def large(self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LargeText:
        monkeypatch.setattr(data, "LARGE_FILE", 1000)
        (tmp_path / "large.txt").write_text(text, "utf-8")
        (document,) = load_documents([str(tmp_path / "large.txt")])
        assert isinstance(document, LargeText)
        return document

    @pytest.mark.parametrize("size", [7, 1000, 2**20])
    def test_chunks_are_the_text(self, size: int, text: str, large: LargeText, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data, "PIECE", size)
        assert "".join(large.chunks()) == text == load_texts([str(large.path)])[0]

    def test_a_single_one_is_cut_between_characters(self, text: str, large: LargeText) -> None:
        (first,), (rest,) = split_documents([large])
        parts = ["".join(part.chunks()) for part in (first, rest)]
        assert "".join(parts) == text and first != rest
        for share in (0.995, 0.9951, 0.9952, 0.9953):  # among characters of two to four bytes
            assert "".join(part for half in large.divided(share) for part in half.chunks()) == text

    def test_the_same_text_twice_counts_once(self, text: str, large: LargeText, tmp_path: Path) -> None:
        (tmp_path / "copy.txt").write_text(text, "utf-8")
        (tmp_path / "other.txt").write_text("other " + text, "utf-8")
        documents = load_documents([str(tmp_path / "*.txt")])
        training, held = split_documents(documents)
        assert len(documents) == 3 and len(training) + len(held) == 2

    def test_bytes_that_are_not_utf8(self, large: LargeText, monkeypatch: pytest.MonkeyPatch) -> None:
        content = large.path.read_bytes()
        for at in (3000, 4095, 4096, 4097, len(content)):
            large.path.write_bytes(content[:at] + b"\xff" + content[at:])
            monkeypatch.setattr(data, "PIECE", 4096)
            with pytest.raises(InputError, match=rf"byte 0xff at offset {at} is not UTF-8"):
                read_file(large.path)
        large.path.write_bytes(content + "é".encode()[:1])
        with pytest.raises(InputError, match=rf"byte 0xc3 at offset {len(content)} is not UTF-8"):
            read_file(large.path)

    @pytest.mark.parametrize("piece", [300, 5000])
    def test_tokens_of_pieces_are_those_of_the_whole(self, piece: int, text: str, large: LargeText) -> None:
        tokenizer = load_tokenizer(str(demo_model_path()))
        whole = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        seen: list[tuple[int, int]] = []
        found = tokens_of(tokenizer, [large], piece=piece, progress=lambda *state: seen.append(state))
        assert torch.equal(found, torch.tensor([*whole, tokenizer.eos_token_id]))
        assert len(seen) > len(text) / piece / 2 and seen[-1] == (text_size([large]),) * 2
        assert torch.equal(tokens_of(tokenizer, [text], piece=piece), found)

    def test_text_without_any_space_is_cut_all_the_same(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert len(tokens_of(tokenizer, ["x" * 5000], piece=100)) > 10

    def test_many_tokens_go_to_a_file(
        self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data, "TOKENS_IN_MEMORY", 1000)
        monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
        text = " ".join(["one two three four"] * 4000)
        found = tokens_of(tokenizer, [text], piece=500)
        assert torch.equal(found, torch.tensor([2, 3, 4, 5] * 4000 + [0])) and list(tmp_path.iterdir()) == []
        found[:10] = 1  # a private page, as of any tensor
        assert blocks_of(found, 8)[0].tolist() == [1] * 8

    def test_no_room_for_them(self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(**options: object) -> object:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(data, "TOKENS_IN_MEMORY", 10)
        monkeypatch.setattr(data.tempfile, "TemporaryFile", full)
        with pytest.raises(InputError, match=r"do not fit .*No space left on device.*TMPDIR"):
            tokens_of(tokenizer, ["one two three " * 100])

    def test_memory_of_a_long_line(self, tmp_path: Path) -> None:
        """5 MB in one line took over a gigabyte as one piece."""
        file = tmp_path / "line.txt"
        file.write_text("the words of one very long line " * 160_000)
        program = (
            "import resource, sys\n"
            "from darkformer.hf.load import demo_model_path, load_tokenizer\n"
            "from darkformer.train.data import load_documents, tokens_of\n"
            "tokenizer = load_tokenizer(str(demo_model_path()))\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "tokens = tokens_of(tokenizer, load_documents([sys.argv[1]]))\n"
            "print(len(tokens), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, str(file)], capture_output=True, text=True, timeout=HANG_SECONDS
        )
        assert run.returncode == 0, run.stderr
        count, kilobytes = map(int, run.stdout.split())
        assert count > 1_000_000 and kilobytes < 400_000


class TestRefusals:
    def test_bytes_that_are_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "latin.txt"
        file.write_bytes("naïf".encode("latin-1"))
        with pytest.raises(InputError, match=r"latin\.txt: byte 0xef at offset 2 is not UTF-8 .* iconv"):
            read_file(file)
        with pytest.raises(InputError, match="offset 2"):
            load_documents([str(file)])

    def test_a_file_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Path, *args: object) -> bytes:
            raise PermissionError(13, "Permission denied")

        (tmp_path / "a.txt").write_text("text", "utf-8")
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(InputError, match=r"a\.txt: cannot be read: Permission denied"):
            load_documents([str(tmp_path / "a.txt")])

    @pytest.mark.parametrize("name", ["missing.txt", "*.log", "sub"])
    def test_no_match(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        with pytest.raises(InputError, match="no file matches"):
            load_documents([str(tmp_path / name)])

    @pytest.mark.parametrize("text", ["", " \n\t\n"])
    def test_nothing_in_the_files(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(text, "utf-8")
        with pytest.raises(InputError, match=r"a\.txt: no text found"):
            load_documents([str(tmp_path / "a.txt")])

    def test_no_source(self) -> None:
        with pytest.raises(InputError, match=r"\(none\): no text found"):
            load_documents([])

    def test_a_dataset_that_cannot_be_loaded(self) -> None:
        with pytest.raises(InputError, match=r"--data no/such: matches no file, and as a dataset's name"):
            load_documents(["no/such"])

    def test_datasets_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match=r"pip install 'darkformer\[train\]'"):
            load_documents(["no/such"])


class TestDatasets:
    """The path of a data set's name, with a stream from memory in the hub's place."""

    @staticmethod
    def _serve(monkeypatch: pytest.MonkeyPatch, column: str) -> list[tuple[object, ...]]:
        import datasets

        calls: list[tuple[object, ...]] = []

        def load_dataset(*args: object, **options: object) -> datasets.IterableDataset:
            calls.append((*args, options))
            rows = datasets.Dataset.from_dict({column: [f"document {i}" for i in range(9)]})
            return rows.to_iterable_dataset()

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    def test_rows_are_streamed_up_to_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self._serve(monkeypatch, "text")
        assert load_documents(["allenai/c4:en"], limit=4) == [f"document {i}" for i in range(4)]
        assert calls == [("allenai/c4", "en", {"split": "train", "streaming": True})]

    def test_without_a_subset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self._serve(monkeypatch, "text")
        assert len(load_documents(["corpus"])) == 9
        assert calls[0][:2] == ("corpus", None)

    def test_a_row_without_text_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        rows = datasets.Dataset.from_dict({"text": ["one", None, "two"]}).to_iterable_dataset()
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
        assert load_documents(["corpus"]) == ["one", "two"]

    def test_without_a_text_column(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._serve(monkeypatch, "content")
        with pytest.raises(InputError, match=r"no 'text' column \(columns: content\)"):
            load_documents(["corpus"])


class TestSplit:
    @pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 16, 100])
    def test_every_document_is_on_one_side(self, count: int) -> None:
        documents = [f"document {i}" for i in range(count)]
        training, held = split_documents(documents)
        assert Counter(training + held) == Counter(documents)
        assert len(held) == max(1, count // 8)
        assert (training, held) == split_documents(list(documents))

    def test_the_same_text_twice_is_not_on_both_sides(self) -> None:
        # As `--data a.txt 'docs/*.txt'` gives it, and as two of Python's own topics are.
        for documents in ([f"document {i % 5}" for i in range(40)], pydoc_documents()):
            training, held = split_documents(documents)
            assert set(training).isdisjoint(held)
            assert set(training) | set(held) == set(documents)

    def test_a_single_document_is_cut(self) -> None:
        text = "".join(map(str, range(1000)))
        (training,), (held,) = split_documents([text])
        assert training + held == text
        assert 0.09 < len(held) / len(text) < 0.11


class TestTokenBlocks:
    def test_blocks_and_ends_of_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        blocks = token_blocks(tokenizer, ["one two three", "four five six one"], seq_len=4)
        assert blocks.dtype == torch.int64
        assert blocks.tolist() == [[2, 3, 4, 0], [5, 6, 1, 2]]  # the last end of text fills no block

    @pytest.mark.parametrize("in_memory", [2**23, 3], ids=["memory", "file"])
    def test_blocks_begin_as_the_tokenizer_begins_a_text(
        self, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, in_memory: int
    ) -> None:
        monkeypatch.setattr("darkformer.train.data.TOKENS_IN_MEMORY", in_memory)
        monkeypatch.setattr("darkformer.train.data.PIECE", 8)  # two blocks at a time
        begun = copy.deepcopy(tokenizer)
        template = TemplateProcessing(single="five $A one", special_tokens=[("five", 6), ("one", 2)])
        begun.backend_tokenizer.post_processor = template
        assert prefix_of(begun) == [6] and prefix_of(tokenizer) == []
        blocks = token_blocks(begun, ["one two three", "four five six one", "two"], seq_len=4)
        assert blocks.tolist() == [[6, 2, 3, 4], [6, 0, 5, 6], [6, 1, 2, 0]]
        with pytest.raises(InputError, match="sequences of 1 tokens: the tokenizer alone begins each with 1"):
            token_blocks(begun, ["one two"], seq_len=1)

    def test_without_an_end_of_text(self, tokenizer: PreTrainedTokenizerFast) -> None:
        class Endless:
            eos_token_id = None

            def __call__(self, *args: object, **options: object) -> object:
                return tokenizer(*args, **options)

        assert token_blocks(Endless(), ["one", "two"], seq_len=2).tolist() == [[2, 3]]

    def test_too_short_says_by_how_much(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(InputError, match="the text has 6 tokens, one sequence needs 7"):
            token_blocks(tokenizer, ["one two", "three four"], seq_len=7)
        assert token_blocks(tokenizer, ["one two", "three four"], seq_len=6).shape == (1, 6)
