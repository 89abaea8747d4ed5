import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from experiment.config import Section, build_config, did_you_mean, dump_config, flatten, load_config
from experiment.errors import UserError

Positive = Annotated[int, Field(gt=0)]


class Source(Section):
    path: str
    weight: Annotated[float, Field(gt=0.0)] = 1.0


class Corpus(Section):
    train: str | list[Source] = "corpus"
    eval: dict[str, str] = Field(default_factory=dict)


class Schedule(Section):
    steps: Positive | None = None
    epochs: float | None = None
    note: str | None = None
    unit: Literal["token", "word"] = "token"
    size: Positive | Literal["auto"] = "auto"
    betas: tuple[float, float] = (0.9, 0.98)
    rate: Annotated[float, Field(lt=1)] | tuple[float, ...] = 0.15

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("needs one of 'steps' and 'epochs'")
        return self


class Run(Section):
    name: str = "run"
    lr: float = 5e-4
    resume: bool = False
    tags: tuple[str, ...] = ()
    limits: list[int] = Field(default_factory=list)
    model: dict[str, Any] = Field(default_factory=dict)


class Config(Section):
    run: Run = Run()
    corpus: Corpus = Corpus()
    schedule: Schedule = Schedule()


def overridden(key: str, raw: str) -> Any:
    """The value of `key` after `--key=raw` on top of the defaults."""
    value: Any = build_config(Config, {}, {key: raw})
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def message(tree: dict[str, Any], overrides: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as raised:
        build_config(Config, tree, overrides)
    return str(raised.value)


def message_of_file(tmp_path: Path, text: str | bytes, overrides: dict[str, str] | None = None) -> str:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised:
        load_config(Config, path, overrides)
    assert str(path) in str(raised.value) or "command line" in str(raised.value)
    return str(raised.value).replace(str(path), "FILE")


# Files


def test_a_file_and_overrides_become_a_typed_config(tmp_path: Path) -> None:
    """Catches a loader that loses values, defaults, or the precedence of the command line."""
    path = tmp_path / "c.yaml"
    path.write_text("run: {lr: 5e-4, name: a}\nschedule:\n  betas: [0.9, 1]\n  steps: 7\n")
    config = load_config(Config, path, {"run.name": "b"})
    assert (config.run.name, config.run.lr, config.schedule.betas, config.schedule.steps) == ("b", 5e-4, (0.9, 1.0), 7)
    assert config.corpus == Corpus()


@pytest.mark.parametrize("text", [b"", b"# only a comment\n", b"---\n", b"\xef\xbb\xbfrun: {}\n"])
def test_an_empty_file_and_a_byte_order_mark_are_no_error(tmp_path: Path, text: bytes) -> None:
    """Catches an empty file read as null, and a byte order mark read as part of a key."""
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    assert load_config(Config, path) == Config()


@pytest.mark.parametrize("name", ["train.csv", "TRAIN.TSV", "text.jsonl.gz"])
def test_a_data_file_is_not_a_config(tmp_path: Path, name: str) -> None:
    """Catches advice on YAML for who gives the data in place of a config."""
    (tmp_path / name).write_text("label,text\n1,good: yes\n")
    with pytest.raises(UserError, match=rf"{name} is not a config: expected a YAML file, which names the data"):
        load_config(Config, tmp_path / name)


def _aliases(value: bytes) -> bytes:
    """Keys b to t, each of which has the key before it four times: `value` of the last has 4 ** 19 of the first."""
    return b"".join(b"%c: &%c " % (key, key) + value % ((key - 1,) * 4) + b"\n" for key in range(ord("b"), ord("u")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"run: {}\nrun: {}\n", "FILE, line 2: duplicate key 'run', already in line 1"),
        (b"run:\n  lr: 1\n  name: x\n  lr: 2\n", "FILE, line 4: duplicate key 'lr', already in line 2"),
        (b"run:\n\tlr: 1\n", "FILE, line 2: found a tab: use spaces, not tabs"),
        (b"run: {lr:1}\n", "FILE, line 1: write 'lr: 1', with a space after the colon"),
        (b"run: [1,\n", "FILE, line 2: "),
        (b"run: {}\n---\nrun: {}\n", "FILE, line 2: "),
        (b"run:\n  lr: \xff\n", "FILE, line 2: not UTF-8 text"),
        (b"run: \x07\n", "FILE: the character '\\x07'"),
        (b"run: {name: !!python/name:os.system }\n", "FILE, line 1: could not determine a constructor"),
        (b"run: {name: !!binary eA== }\n", "FILE, line 1: could not determine a constructor"),
        (b"run: &again {model: *again}\n", "FILE: expected only mappings"),
        (
            b"a: &a [1, 2, 3, 4]\n" + _aliases(b"[*%c, *%c, *%c, *%c]"),
            "FILE, line 9: aliases make this more than 100,000",
        ),
        (b"a: &a {x: 1}\n" + _aliases(b"{<<: [*%c, *%c, *%c, *%c]}"), "FILE, line 9: aliases make this more than"),
        (b'run: {name: "\\ud800"}\n', "FILE: expected only mappings"),
        (b"[" * 5000, "FILE: nested too deeply"),
        (b"run: " + b"[" * 210 + b"]" * 210, "FILE: nested too deeply"),
        (
            b"run:\n  seed: " + b"9" * 10_000,
            "FILE, line 2: cannot read '99999999999999999999' as int: Exceeds the limit",
        ),
        (b"run: {lr: !!float high }\n", "FILE, line 1: cannot read 'high' as float"),
        (b"run: {lr: !!bool maybe }\n", "FILE, line 1: cannot read 'maybe' as bool"),
        (b"run: {lr: !!float }\n", "FILE, line 1: cannot read '' as float"),
        (b"- run\n", 'FILE: expected a mapping of sections at the top level, found a list (["run"])'),
        (b"run\n", "found text"),
        (b"run: {lr: high}\n", "FILE, line 1: 'run.lr': expected a number, found text (\"high\")"),
        (b"run:\n  tags:\n  - a\n  - 5\n", "FILE, line 4: 'run.tags.1': expected text, found a whole number (5)"),
        (b"corpus:\n  train:\n  - weight: 2\n", "FILE, line 3: 'corpus.train.0.path' is missing"),
        (b"schedule:\n  stps: 3\n", "FILE, line 2: unknown config key 'schedule.stps'; did you mean 'schedule.steps'?"),
        (
            b"schedule:\n  max_steps: 3\n",
            "FILE, line 2: unknown config key 'schedule.max_steps'; did you mean 'schedule.steps'?",
        ),
        (
            "schedule: {steps：3}\n".encode(),
            "FILE, line 1: unknown config key 'schedule.steps：3'; the full-width '：' is text in YAML; did you",
        ),
        (
            "schedule：\n  steps: 3\n".encode(),
            "line 2: mapping values are not allowed here; the full-width '：' is text in YAML; did you mean ':'?",
        ),
        (
            "run:\n　lr: 3\n".encode(),
            "line 2: unknown config key '　lr'; the full-width '　' is text in YAML; did you mean ' '?",
        ),
        ("run: {lr: 3，name: a}\n".encode(), "but got ':'; the full-width '，' is text in YAML; did you mean ','?"),
        (
            "run:\n  lr: 3 ＃ high\n".encode(),
            "found text (\"3 ＃ high\"); the full-width '＃' is text in YAML; did you mean '#'?",
        ),
        (
            "run: ［a］ # 注：a\n".encode(),
            "found text (\"［a］\"); the full-width '［' is text in YAML; did you mean '['?",
        ),
    ],
)
def test_an_invalid_file_gives_the_line_of_the_problem(tmp_path: Path, text: bytes, expected: str) -> None:
    """Catches tracebacks, and messages that leave the user to search the file."""
    assert expected in message_of_file(tmp_path, text)


def test_full_width_punctuation_in_the_names_of_users_is_right() -> None:
    """Catches a hint to change the name of a row, for a mistake in a key below it."""

    class Rows(Section):
        rows: dict[str, Source]

    with pytest.raises(UserError, match=r"weigth'; did you mean '.*\.weight'"):
        build_config(Rows, {"rows": {"大：模型": {"path": "a", "weigth": 1.0}}}, {})


def test_full_width_punctuation_in_comments_is_right(tmp_path: Path) -> None:
    """Catches a hint to change a comment or a quoted text, of which the mistake is not a part."""
    assert message_of_file(tmp_path, "# 注：a\nrun: {name: '，', lr: [}  # 注：b\n").endswith("but found '}'")


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_an_unreadable_file_is_a_user_error(tmp_path: Path, name: str) -> None:
    """Catches a traceback for a mistyped path, or for a folder instead of a file."""
    with pytest.raises(UserError, match="cannot read the config file"):
        load_config(Config, tmp_path / name)


def test_a_pipe_is_rejected(tmp_path: Path) -> None:
    """Catches an error about missing keys for `<(…)`, which the next reader of the config finds empty."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe; expected a file"):
        load_config(Config, tmp_path / "pipe")


def test_a_message_names_the_file_or_the_command_line(tmp_path: Path) -> None:
    """Catches a message that blames a line of the file for the value of an override."""
    text = "schedule:\n  epochs: 2\nrun:\n  lr: 1\n"
    assert message_of_file(tmp_path, text, {"run.lr": "fast"}).startswith("command line: 'run.lr': expected a number")
    both = message_of_file(tmp_path, text, {"schedule.steps": "3", "run.lr": "2"})
    assert both == "FILE, line 1, with --schedule.steps: 'schedule': needs one of 'steps' and 'epochs'"


def test_merge_keys_and_aliases_are_no_duplicates(tmp_path: Path) -> None:
    """Catches a check for duplicate keys that counts keys merged with `<<`."""
    path = tmp_path / "c.yaml"
    path.write_text("run: {model: {a: &base {x: 1, y: 2}, b: {<<: *base, x: 3}}}\n")
    assert load_config(Config, path).run.model == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


def test_keys_are_text(tmp_path: Path) -> None:
    """Catches names such as 2024.10 that become numbers, of which two may be the same."""
    path = tmp_path / "c.yaml"
    path.write_text("run: {model: {2024.1: a, 2024.10: b, 1e3: &v 5, true: d, null: e, 010: f, *v : g}}\n")
    names = {"2024.1": "a", "2024.10": "b", "1e3": 5, "true": "d", "null": "e", "010": "f", "5": "g"}
    assert load_config(Config, path).run.model == names


# Messages


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"run": {"lr": "x"}}, "'run.lr': expected a number, found text (\"x\")"),
        ({"run": {"lr": True}}, "'run.lr': expected a number, found true/false (true)"),
        ({"run": {"lr": float("inf")}}, "'run.lr': should be a finite number, found a number (Infinity)"),
        ({"run": {"name": 2024}}, "'run.name': expected text, found a whole number (2024): write it in quotes"),
        ({"run": {"name": None}}, "'run.name': expected text, found null"),
        ({"run": {"resume": 1}}, "'run.resume': expected true or false, found a whole number (1)"),
        ({"run": {"model": [1]}}, "'run.model': expected a mapping, found a list ([1])"),
        ({"run": 3}, "'run': expected a mapping, found a whole number (3)"),
        ({"schedule": {"steps": 0}}, "'schedule.steps': should be greater than 0, found a whole number (0)"),
        ({"schedule": {"steps": 1.5}}, "'schedule.steps': expected a whole number or null, found a number (1.5)"),
        ({"schedule": {"unit": "line"}}, "'schedule.unit': expected 'token' or 'word', found text (\"line\")"),
        ({"schedule": {"size": "x"}}, "'schedule.size': expected a whole number or 'auto', found text (\"x\")"),
        ({"schedule": {"size": -1}}, "'schedule.size': should be greater than 0, found a whole number (-1)"),
        ({"schedule": {"betas": [1]}}, "'schedule.betas': expected a list of 2, found a list ([1])"),
        ({"schedule": {"betas": [1, 2, 3]}}, "'schedule.betas': expected a list of 2, found a list ([1, 2, 3])"),
        ({"schedule": {"betas": ["a", 1]}}, "'schedule.betas.0': expected a number, found text (\"a\")"),
        (
            {"corpus": {"eval": {"w": 1}}},
            "'corpus.eval.w': expected text, found a whole number (1): write it in quotes",
        ),
        ({"corpus": {"train": True}}, "'corpus.train': expected text or a list, found true/false (true)"),
        ({"corpus": {"train": [3]}}, "'corpus.train.0': expected a mapping, found a whole number (3)"),
        (
            {"corpus": {"train": [{"path": "a", "weight": 0}]}},
            "'corpus.train.0.weight': should be greater than 0, found a whole number (0)",
        ),
        ({"schedule": {"steps": 1, "epochs": 1}}, "'schedule': needs one of 'steps' and 'epochs'"),
    ],
)
def test_a_wrong_value_gives_one_message(tree: dict[str, Any], expected: str) -> None:
    """Catches pydantic's own messages, several messages about the branches of one union, and a missing value or
    expectation."""
    assert message(tree) == f"config: {expected}"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("schedul", "schedule"),
        ("schedule.step", "schedule.steps"),
        ("schedul.steps", "schedule.steps"),
        ("lr", "run.lr"),
        ("schedule.lr", "run.lr"),
        ("corpus.evals", "corpus.eval"),
    ],
)
def test_an_unknown_key_suggests_a_known_one(key: str, meant: str) -> None:
    """Catches a suggestion that ignores the other sections, in overrides and in files alike."""
    assert message({}, {key: "1"}) == f"command line: unknown config key '{key}'; did you mean '{meant}'?"
    tree: Any = 1
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert f"did you mean '{meant}" in message(tree) or f"did you mean '{meant.split('.')[0]}'" in message(tree)


def test_a_key_unlike_any_other_lists_the_known_ones() -> None:
    """Catches a far-fetched suggestion."""
    assert message({}, {"run.zzzzzz": "1"}).endswith("; known: limits, lr, model, name, resume, tags")
    assert did_you_mean("zzz", {"b": 1, "a": 2}) == "; known: a, b"


def test_all_problems_are_reported_at_once() -> None:
    """Catches a config whose problems are reported one run at a time."""
    assert len(message({"run": {"lr": "x", "nme": 1}, "schedule": {"steps": -1}}).splitlines()) == 3


@pytest.mark.parametrize("key", ["run.name.x", "run.tags.0", "run.lr.x.y"])
def test_an_override_below_a_scalar_is_rejected(key: str) -> None:
    """Catches an override that replaces a scalar by a mapping."""
    assert message({}, {key: "1"}).startswith(f"command line: unknown config key '{key}'")


# Overrides


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("run.name", "2024_01", "2024_01"),
        ("run.name", "run#1", "run#1"),
        ("run.name", "1e3", "1e3"),
        ("run.name", "null", "null"),
        ("run.name", "", ""),
        ("run.name", "[a]", "[a]"),
        ("run.name", "a: b: c", "a: b: c"),
        ("run.name", " - *x", " - *x"),
        ("schedule.note", "#2 String", "#2 String"),
        ("schedule.note", "#", "#"),
        ("schedule.note", "~", "~"),
        ("schedule.note", "!", "!"),
        ("schedule.note", " ", " "),
        ("schedule.note", "", None),
        ("schedule.note", "null", None),
        ("schedule.note", "None", None),
        ("run.lr", "1e-3", 1e-3),
        ("run.lr", "1", 1.0),
        ("run.resume", "True", True),
        ("run.resume", "false", False),
        ("run.tags", "[2024_01, 1e3, 'x', null]", ("2024_01", "1e3", "x", "null")),
        ("run.tags", "a,run#1,1e3", ("a", "run#1", "1e3")),
        ("run.tags", "a", ("a",)),
        ("run.tags", "", ()),
        ("run.limits", "[1, 2]", [1, 2]),
        ("run.limits", "1,2", [1, 2]),
        ("run.limits", "3", [3]),
        ("run.model.hidden_size", "64", 64),
        ("run.model.rope.theta", "1e4", 10000.0),
        ("run.model.act", "gelu", "gelu"),
        ("run.model.act", "run#1", "run#1"),
        ("run.model.layers", "[1, a]", [1, "a"]),
        ("run.model.x", "null", None),
        ("run.model", "{a: 1, b: {c: [x]}}", {"a": 1, "b": {"c": ["x"]}}),
        ("corpus.eval.wiki", "2024", "2024"),
        ("corpus.eval", "{wiki: 2024, news: n}", {"wiki": "2024", "news": "n"}),
        ("corpus.train", "1e3", "1e3"),
        ("corpus.train", "a,b", "a,b"),
        ("corpus.train", "[x", "[x"),
        ("corpus.train", "[{path: 7, weight: 2}]", [Source(path="7", weight=2.0)]),
        ("schedule.steps", "7", 7),
        ("schedule.steps", "null", None),
        ("schedule.steps", "None", None),
        ("schedule.size", "8", 8),
        ("schedule.size", "auto", "auto"),
        ("schedule.betas", "0.8,0.9", (0.8, 0.9)),
        ("schedule.rate", "0.3", 0.3),
        ("schedule.rate", "0.3,0.1", (0.3, 0.1)),
        ("schedule.unit", "word", "word"),
        ("schedule", "{steps: 3, unit: word}", Schedule(steps=3, unit="word")),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(key: str, raw: str, value: Any) -> None:
    """Catches guessed types: `2024_01` as a number, `run#1` cut off at the comment sign, a comment as null."""
    found = overridden(key, raw)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "raw", "expected"),
    [
        ("run.lr", "1_000", 'expected a number, found text ("1_000")'),
        ("run.lr", "", "expected a number, found null"),
        ("run.lr", "[1]", 'expected a number, found text ("[1]")'),
        ("schedule.steps", "1e3", "expected a whole number or null, found a number (1000.0)"),
        ("run.limits", "1,x", 'expected a whole number, found text ("x")'),
        ("run.limits", "[1", "expected a list, found text"),
        ("run.limits", "[&a [*a]]", "expected a list, found text"),
        ("run.limits", "!!python/name:os.system x", "expected a list, found text"),
        ("run.lr", "!!binary eA==", "expected a number, found text"),
        ("run.model", "x", "expected a mapping, found text"),
        ("run.model", "{a:1}", "line 1: write 'a: 1', with a space after the colon"),
        ("schedule.rate", "15", "'schedule.rate': should be less than 1, found a whole number (15)"),
        ("schedule", "{steps: 1, epochs: 1}", "needs one of"),
    ],
)
def test_a_wrong_override_is_rejected(key: str, raw: str, expected: str) -> None:
    """Catches a traceback, or a value that is silently read as another."""
    found = message({}, {key: raw})
    assert found.startswith("command line: ")
    assert expected in found


def test_keys_refine_a_whole_section_in_any_order() -> None:
    """Catches an override that is lost because another one follows it."""
    tree = {"schedule": {"epochs": 2.0, "unit": "word"}}
    whole, part = ("schedule", "{steps: 3}"), ("schedule.betas", "0.5,0.6")
    expected = Schedule(steps=3, betas=(0.5, 0.6))
    for overrides in (dict([whole, part]), dict([part, whole])):
        assert build_config(Config, tree, overrides).schedule == expected


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_field_takes_any_text_literally(text: str) -> None:
    """Catches quoting, stripping and YAML parsing of raw text."""
    assert overridden("run.name", text) == text


# Round trip

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
odd_texts = st.sampled_from(
    ["5e-4", "yes", "on", "010", "1_000", "null", "~", "2024-01-01", "1:30", "=", "<<", " x ", ".inf"]
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | st.integers() | numbers | texts | odd_texts
trees = st.dictionaries(
    texts | odd_texts,
    st.recursive(leaves, lambda below: st.lists(below, max_size=3) | st.dictionaries(texts, below, max_size=3)),
    max_size=4,
)


@settings(max_examples=60)
@given(
    name=texts | odd_texts,
    lr=numbers,
    tags=st.lists(texts | odd_texts, max_size=3),
    model=trees,
    train=texts | st.lists(st.builds(Source, path=texts, weight=st.floats(1e-300, 1e300)), max_size=2),
)
def test_a_dumped_config_loads_as_itself(
    tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, tags: list[str], model: Any, train: Any
) -> None:
    """Catches values that change their type in RUN/config.yaml, such as the text '5e-4'."""
    run = Run(name=name, lr=lr, tags=tuple(tags), model=model)
    config = Config(run=run, corpus=Corpus(train=train))
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    loaded = load_config(Config, path)
    assert loaded == config
    assert repr(loaded) == repr(config)


def test_infinity_in_a_mapping_is_kept() -> None:
    """Catches a dump that writes null for what JSON cannot represent."""
    config = Config(run=Run(model={"x": float("inf")}))
    assert ".inf" in dump_config(config)


def test_flatten_names_every_leaf() -> None:
    """Catches missing keys, which a resume would then not compare."""
    flat = flatten(Config(run=Run(model={"a": {"b": [1]}, "c": {}})))
    assert flat["run.model.a.b"] == [1]
    assert flat["run.model.c"] == {}
    assert flat["schedule.betas"] == [0.9, 0.98]
    assert "run" not in flat


def test_a_config_cannot_be_changed() -> None:
    """Catches a section that can be modified after validation."""
    with pytest.raises(ValueError, match="frozen"):
        Config().run.lr = 1.0  # type: ignore[misc]


def test_a_name_that_is_not_unicode() -> None:
    """Catches bytes of a file name that are called nesting."""

    class Config(Section):
        path: str

    with pytest.raises(UserError, match="a name is not UTF-8; rename the file or folder"):
        build_config(Config, {"path": "a"}, {"path": "\udcff"})
