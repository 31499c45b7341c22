from pathlib import Path

import pytest
import torch

from lightning_nested.datamodules import TabularDataModule


def ready(*args: str, **options: object) -> TabularDataModule:
    data = TabularDataModule(*args, **options)  # type: ignore[arg-type]
    data.setup()
    return data


@pytest.mark.parametrize(
    ("source", "features", "classes"), [("breast_cancer", 30, 2), ("diabetes", 10, None), ("wine", 13, 3)]
)
def test_sets_of_scikit_learn_are_standardized_by_their_training_rows(
    source: str, features: int, classes: int
) -> None:
    data = ready(source, train_size=100, val_size=50)
    assert (data.num_features, data.num_classes) == (features, classes)
    torch.testing.assert_close(data.train_inputs.mean(0), torch.zeros(features), rtol=0, atol=1e-5)
    torch.testing.assert_close(data.train_inputs.std(0), torch.ones(features), rtol=0, atol=1e-5)
    assert [len(data.train_target), len(data.val_target)] == [100, 50]
    if classes is None:
        assert data.train_target.shape == (100, 1)
        assert data.train_target.std().item() == pytest.approx(1.0, abs=1e-5)


def test_columns_of_noise_come_last_and_the_split_is_that_without_them() -> None:
    plain, noisy = (
        ready("wine", train_size=90, val_size=40),
        ready("wine", train_size=90, val_size=40, noise_columns=7),
    )
    assert noisy.noise.tolist() == [False] * 13 + [True] * 7
    assert torch.equal(noisy.train_inputs[:, ~noisy.noise], plain.train_inputs)
    assert torch.equal(noisy.test_target, plain.test_target)
    rows = noisy.train_inputs[:, noisy.noise]
    # Of 90 standard normal numbers: means within four standard deviations of 0.11.
    assert float(rows.mean(0).abs().max()) < 0.45
    batch = next(iter(noisy.train_dataloader()))
    assert [part.shape for part in batch] == [(32, 20), (32,)]


def test_a_csv_has_words_as_columns_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "stones.csv"
    lines = [f"{k / 7:.4f},{'red' if k % 3 else 'blue'},{k * 1.5}" for k in range(30)]
    path.write_text("carat,colour,price\n" + "\n".join(lines), encoding="utf-8")
    data = ready(str(path), train_size=15, val_size=5, with_index=True)
    assert data.columns == ("carat", "colour=blue", "colour=red")
    assert data.num_classes is None
    assert len(data.test_target) == 10
    assert len(next(iter(data.train_dataloader()))) == 3
    # The price is a multiple of the carat, so standardized they are equal but for four digits.
    torch.testing.assert_close(data.train_inputs[:, 0], data.train_target[:, 0], rtol=0, atol=1e-3)
    classes = ready(str(path), target="colour", train_size=15, val_size=5)
    assert (classes.num_classes, classes.columns) == (2, ("carat", "price"))
    assert classes.train_target.dtype == torch.int64


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Got 'none.csv', and there is none"):
        ready("none.csv")
    with pytest.raises(ValueError, match=r"must be less than the 178 rows of wine. Got 100 \+ 78"):
        ready("wine", train_size=100, val_size=78)
    with pytest.raises(ValueError, match=r"source must be one of .* or a file.csv. Got 'iris'"):
        TabularDataModule("iris")
    (tmp_path / "a.csv").write_text("x,y\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"target must be a column of a.csv: x, y. Got 'z'"):
        ready(str(tmp_path / "a.csv"), target="z")


def written(tmp_path: Path, *lines: str, header: str = "x,kind,price", encoding: str = "utf-8") -> str:
    path = tmp_path / "own.csv"
    path.write_text("\n".join([header, *lines]), encoding=encoding)
    return str(path)


ROWS = [f"{k / 7:.4f},{'ab'[k % 2]},{k * 1.5}" for k in range(30)]


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        (0, {7: ""}, r"Got '' in line 9, column 'x' of own.csv; .* 1 such"),
        (0, {7: "nan", 9: "inf"}, r"Got 'nan' in line 9, column 'x' of own.csv; .* 2 such"),
        (0, {7: "1e39"}, "Got '1e39' in line 9"),  # beyond single precision
        (1, {7: " "}, "Got ' ' in line 9, column 'kind'"),
        (2, {7: "NaN"}, "Got 'NaN' in line 9, column 'price'"),
        (
            0,
            {7: "n/a"},
            "30 different values in 30 rows, and 'n/a', which is no number, in line 9, column 'x'",
        ),
        (0, {k: f'"{k},5"' for k in range(30)}, "'0,5', which is no number, in line 2"),
        (2, {k: f'"{k},5"' for k in range(30)}, "'0,5', which is no number, in line 2, column 'price'"),
        (0, {7: "1,5"}, "Got 4 in line 9 of own.csv; a comma inside a cell needs quotes"),
    ],
)
def test_cells_that_are_no_data_are_named(
    tmp_path: Path, column: int, cells: dict[int, str], message: str
) -> None:
    rows = [row.split(",") for row in ROWS]
    for row, cell in cells.items():
        rows[row][column] = cell
    path = written(tmp_path, *map(",".join, rows))
    with pytest.raises(ValueError, match=message):
        ready(path, train_size=15, val_size=5)


def test_words_among_many_numbers_that_repeat_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, *(f"{'?' if k == 5 else k % 25},a,{k * 1.5}" for k in range(100)))
    with pytest.raises(
        ValueError, match=r"26 different values in 100 rows, and '\?', which is no number, in line 7"
    ):
        ready(path, train_size=15, val_size=5)


def test_blank_lines_and_the_mark_of_excel_are_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path, *ROWS[:10], "", *ROWS[10:], " ", "", encoding="utf-8-sig")
    data = ready(path, target="x", train_size=15, val_size=5)
    assert data.columns == ("kind=a", "kind=b", "price")
    assert len(data.test_target) == 10


def test_whole_numbers_are_classes_unless_said_otherwise(tmp_path: Path) -> None:
    path = written(tmp_path, *(f"{k / 7:.4f},{'ab'[k % 2]},{k % 4 * 100}" for k in range(30)))
    sizes = {"train_size": 15, "val_size": 5}
    assert ready(path, **sizes).num_classes == ready(path, classes=True, **sizes).num_classes == 4
    numbers = ready(path, classes=False, **sizes)
    assert numbers.num_classes is None
    assert numbers.train_target.shape == (15, 1)
    with pytest.raises(
        ValueError, match=r"classes=False needs a target of numbers\. Got words in column 'kind'"
    ):
        ready(path, target="kind", classes=False, **sizes)
    with pytest.raises(ValueError, match="classes must be None for 'wine'"):
        TabularDataModule("wine", classes=True)


def test_a_header_that_names_no_input_is_refused(tmp_path: Path) -> None:
    for header, row in (("x;price", "1;2"), ("x,x,price", "1,2,3")):
        with pytest.raises(ValueError, match=f"two columns or more, separated by commas.*{header[:2]}"):
            ready(written(tmp_path, row, header=header))
    with pytest.raises(ValueError, match=r"target must be a column of own.csv: . Got None"):
        ready(written(tmp_path, header=""))
