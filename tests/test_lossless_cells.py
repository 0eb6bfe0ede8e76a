"""The lossless benchmark covers what it says: every prompt with every drafter, every setting of a drafter with its share."""

from collections import Counter

from tests.benchmarks.bench_lossless import DRAFTERS, SETTINGS, Answers, Cell, exact_cells
from tests.benchmarks.bench_spec import COLUMNS, goals
from tests.tiny_vlm import request


def test_every_prompt_meets_every_drafter_once():
    cells = list(exact_cells(100))
    assert len({cell.name for cell in cells}) == len(cells) == len(DRAFTERS) * len(SETTINGS)
    seen = Counter((cell.drafter, index) for cell in cells for index in cell.members)
    assert set(seen.values()) == {1} and len(seen) == 100 * len(DRAFTERS)
    assert {len(cell.members) for cell in cells} == {8, 9}


def test_a_cell_holds_greedy_and_sampled_prompts_with_and_without_images():
    def kinds(cell: Cell) -> set[tuple[int, int]]:
        return {(index % 2, index % 3) for index in cell.members}  # see tests.tiny_vlm.request

    assert all(len(kinds(cell)) == 6 for cell in exact_cells(1000))


def test_a_known_answer_goes_on_where_a_resumed_request_stands():
    asked = request(5, prompt=(40, 41))
    known = Answers([asked], [[50, 51, 52]])

    class Resumed:
        request = asked

    assert known(Resumed) == [50, 51, 52]
    Resumed.request = request(5, prompt=(40, 41, 50))
    assert known(Resumed) == [51, 52]
    Resumed.request = request(5, prompt=(40, 41, 99))
    assert known(Resumed) == []


def test_goals_are_read_off_batch_one_at_temperature_zero():
    def row(batch: int, temperature: float, variant: str, decode: float) -> list:
        values = {"batch": batch, "T": temperature, "variant": variant, "decode x": decode, "end to end x": decode / 2}
        return [values.get(name, 0) for name in COLUMNS]

    rows = [row(1, 0.0, "eagle", 3.0), row(1, 0.0, "eagle", 1.0), row(1, 0.0, "n-gram", 2.0), row(4, 0.0, "eagle", 9.0)]
    assert goals(rows) == {"decode x": (3.0, 2.0), "end to end x": (1.5, 1.6), "decode against n-gram x": (1.5, 1.15)}
    assert goals(rows[-1:]) == {}
