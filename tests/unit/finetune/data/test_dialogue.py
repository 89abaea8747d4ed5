import json
from pathlib import Path

import pytest

from experiment.config import build_config
from experiment.errors import UserError
from finetune.config import FinetuneConfig
from finetune.data.dialogue import DialogueContext, TurnJoiner
from finetune.data.formats import FileFormat, read_rows
from finetune.data.records import read_records, read_table
from finetune.data.splits import split_off
from finetune.data.task_config import TaskConfig
from finetune.kinds.classification import ClassificationColumns

COLUMNS = ClassificationColumns(text="said")
ROWS = """dialogue,turn,speaker,said,label
7,1,Ann,one,x
7,0,Bob,zero,x
8,0,Ann,hello,y
7,2,Ann,two,y
7,10,,ten,y
"""


def joined(tmp_path: Path, text: str, **context: object) -> list[str]:
    path = tmp_path / "a.csv"
    path.write_text(text)
    table = read_table(path, COLUMNS, joiner=TurnJoiner(DialogueContext(**context), "[SEP]"))  # type: ignore[arg-type]
    return [record.values["text"] for record in table.records]


def test_turns_of_the_same_dialogue_come_before(tmp_path: Path) -> None:
    """Catches turns of another dialogue, turns in the order of the file or of text ("10" < "2"), and rows reordered."""
    assert joined(tmp_path, ROWS, group="dialogue", order="turn", turns=2) == [
        "zero [SEP] one",
        "zero",
        "hello",
        "zero [SEP] one [SEP] two",
        "one [SEP] two [SEP] ten",
    ]


def test_speakers_are_named_and_the_order_is_that_of_the_rows(tmp_path: Path) -> None:
    """Catches speakers on the last turn only, and an empty name before a turn."""
    assert joined(tmp_path, ROWS, group="dialogue", speaker="speaker", turns=1) == [
        "Ann: one",
        "Ann: one [SEP] Bob: zero",
        "Ann: hello",
        "Bob: zero [SEP] Ann: two",
        "Ann: two [SEP] ten",
    ]


def test_a_dialogue_may_be_identified_by_several_columns(tmp_path: Path) -> None:
    """Catches turns of a scene with the same number in another episode: EmoryNLP's scenes restart in each."""
    turns = ("1,1,1,0,a", "1,1,1,1,b", "1,2,1,0,c", "1,2,1,1,d", "2,1,1,0,e", ",,,1,f")
    rows = ["season,episode,scene,turn,said,label", *(f"{turn},x" for turn in turns)]
    texts = joined(tmp_path, "\n".join(rows), group=("season", "episode", "scene"), order="turn")
    assert texts == ["a", "a [SEP] b", "c", "c [SEP] d", "e", "f"]


def test_the_same_turn_twice_is_rejected(tmp_path: Path) -> None:
    """Catches turns of other dialogues, without a warning, where a column does not tell dialogues apart."""
    rows = "episode,scene,turn,said,label\n1,1,0,a,x\n1,1,1,b,x\n2,1,0,c,x\n"
    message = r"a\.csv:4: dialogue 1 has turn 0 twice, see .*a\.csv:2; .*group, such as \[Episode_ID, Scene_ID\]"
    with pytest.raises(UserError, match=message):
        joined(tmp_path, rows, group="scene", order="turn")


def test_previous_turns_may_be_columns(tmp_path: Path) -> None:
    """Catches separators around a turn that does not exist."""
    rows = "before2,before1,said,label\n,a,b,x\n,,a,y\n"
    assert joined(tmp_path, rows, previous=("before2", "before1")) == ["a [SEP] b", "a"]


def test_dialogues_stay_together_in_a_random_split(tmp_path: Path) -> None:
    """Catches a validation split whose utterances are the context of training texts."""
    path = tmp_path / "a.csv"
    rows = (f"{number // 4},text,{'xy'[number // 4 % 2]}\n" for number in range(80))
    path.write_text("dialogue,said,label\n" + "".join(rows))
    table = read_table(path, COLUMNS, joiner=TurnJoiner(DialogueContext(group="dialogue"), "[SEP]"))
    train, validation = split_off(table, TaskConfig(columns=COLUMNS, metric="accuracy"))
    assert len(validation) == 8
    assert not {record.group for record in train.records} & {record.group for record in validation.records}


def test_whole_numbers_may_be_floats(tmp_path: Path) -> None:
    """Catches files in which pandas has stored numbers beside empty cells, and turns without a number."""
    path = tmp_path / "a.jsonl"
    rows = [{"dialogue": 7.0, "turn": 10.0, "t": "b"}, {"dialogue": 7, "turn": 2, "t": "a"}]

    def texts(*more: dict[str, object]) -> list[str]:
        path.write_text("".join(f"{json.dumps({'label': 'x', **row})}\n" for row in (*rows, *more)))
        columns = ClassificationColumns(text="t")
        joiner = TurnJoiner(DialogueContext(group="dialogue", order="turn", turns=1), "[SEP]")
        return [record.values["text"] for record in read_table(path, columns, joiner=joiner).records]

    assert texts({"dialogue": None, "turn": None, "t": "c"}) == ["a [SEP] b", "a", "c"]
    with pytest.raises(UserError, match=r"a\.jsonl:3: expected a number in 'turn', found null"):
        texts({"dialogue": 7, "turn": None, "t": "c"})
    with pytest.raises(UserError, match=r"a\.jsonl:3: dialogue 7 has turn 10 twice"):
        texts({"dialogue": 7, "turn": 10, "t": "c"})
    with pytest.raises(UserError, match=r"expected text or a whole number in 'dialogue', found 0\.5$"):
        texts({"dialogue": 0.5, "turn": 1, "t": "c"})


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"group": "Dialogue"}, r"a\.csv:1: no column 'Dialogue'; .* \(task\.dialogue\.group names"),
        ({"group": "dialogue", "order": "speaker"}, r"a\.csv:2: expected a number in 'speaker', found \"Ann\""),
        ({"group": "dialogue", "speaker": "Speaker"}, r"a\.csv:1: no column 'Speaker'; .* \(task\.dialogue\.speaker"),
    ],
)
def test_bad_columns_are_rejected(tmp_path: Path, context: dict[str, str], message: str) -> None:
    """Catches a traceback, or a key of `columns` that is named for one of `dialogue`."""
    with pytest.raises(UserError, match=message):
        joined(tmp_path, ROWS, **context)


def test_predicting_names_the_flags(tmp_path: Path) -> None:
    """Catches keys of the config in messages of `deepcloze predict`, which has flags for them."""
    path = tmp_path / "a.csv"
    path.write_text(ROWS)
    joiner = TurnJoiner(DialogueContext(group="scene"), "[SEP]")
    with pytest.raises(UserError, match=r"no column 'scene'; .* \(--dialogue\.group names the column\)"):
        list(read_records(read_rows(path, FileFormat()), COLUMNS, joiner=joiner, section="--"))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("{turns: 2}", "expected either 'group' or 'previous'"),
        ("{group: a, previous: [b]}", "expected either 'group' or 'previous'"),
        ("{previous: [b], order: c}", "order: needs 'group'"),
        ("{group: a}", "set special_tokens_in_text: true"),
    ],
)
def test_bad_settings_are_rejected(context: str, message: str) -> None:
    """Catches keys without effect, and separators that become text."""
    tree = {"run": {"dir": "r"}, "task": {"train": "a.csv"}, "model": {"init_from": "m"}}
    with pytest.raises(UserError, match=message):
        build_config(FinetuneConfig, tree, {"task.dialogue": context})


def test_previous_turns_need_no_group() -> None:
    """Catches a separator without spaces, which some tokenizers would read as part of a word."""
    turns = [{"previous": ["a", "b"], "speaker": "Ann"}]
    context = DialogueContext(previous=("x", "y"), speaker="s")
    assert TurnJoiner(context, "</s>").join(["c"], turns) == [{"text": "a </s> b </s> Ann: c"}]
