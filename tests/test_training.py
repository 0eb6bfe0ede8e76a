"""Laws of the training loop: resuming and splitting change nothing, a bad end leaves a usable checkpoint."""

import errno
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn

from multimodal.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from multimodal.schedule import ema_decay, learning_rate_scale, progress
from multimodal.training import LossTerms, TrainingConfig, build_optimizer, train
from multimodal.training_log import read_log
from multimodal.training_state import WeightAverage

CONFIG = TrainingConfig(
    steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=2, device="cpu", log_every=1, save_every=2, keep_last=9
)


class Regressor(nn.Module):
    """Two layers with dropout, a tied weight and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.dropout = nn.Linear(3, 3), nn.Linear(3, 3), nn.Dropout(0.2)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(inputs)))) * self.frozen


def batch_source(index: int) -> dict[str, Tensor]:
    generator = np.random.default_rng([7, index])
    return {"inputs": torch.from_numpy(generator.normal(size=(4, 3)).astype(np.float32)), "count": index % 3 + 1}


def noisy_loss(model: nn.Module, batch: dict, generator: torch.Generator) -> LossTerms:
    """Draws from every generator there is; samples past `count` do not count."""
    inputs = batch["inputs"] + 0.1 * torch.randn(4, 3, generator=generator)
    inputs = inputs + 0.01 * random.random() + 0.01 * float(np.random.rand())
    rows = (model(inputs) - batch["inputs"]).square().mean(1)[: batch["count"]]
    return LossTerms(rows.sum(), len(rows), {"first_row": rows[0]})


def save_policy(folder: Path, state: dict[str, Tensor]) -> None:
    save_checkpoint(folder, model_state=state, config={"kind": "test"})


def run(folder: Path, config: TrainingConfig = CONFIG, loss: Callable = noisy_loss, **options: object) -> Path:
    return train(Regressor(), loss, batch_source, config, folder, save_model=save_policy, **options)


def contents(checkpoint: Path) -> dict[str, Tensor]:
    policy = {f"policy.{name}": value for name, value in load_checkpoint(checkpoint / "policy").state.items()}
    return policy | read_tensors(checkpoint / "training_state" / "state.safetensors")


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def test_two_steps_and_two_resumed_equal_four_straight(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")

    def stop_after_two(folder: Path, step: int) -> None:
        torch.rand(step), np.random.rand(), random.random()  # validation draws do not disturb training
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="--resume=true"):
        run(tmp_path / "halved", on_checkpoint=stop_after_two)
    resumed = run(tmp_path / "halved", resume=True)
    assert resumed == tmp_path / "halved" / "checkpoints" / "000004"
    assert_equal(contents(straight), contents(resumed))
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("straight", "halved")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_checkpoint_whose_validation_was_cut_off_is_validated_on_resume(tmp_path: Path) -> None:
    validated = []

    def validate(folder: Path, step: int) -> dict[str, float]:
        validated.append(step)
        if validated == [2, 4]:
            raise KeyboardInterrupt
        return {"success": 0.5}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_checkpoint=validate)
    run(tmp_path, on_checkpoint=validate, resume=True)
    run(tmp_path, on_checkpoint=validate, resume=True)
    assert validated == [2, 4, 4]
    assert [row["step"] for row in read_log(tmp_path) if "validation/success" in row] == [2, 4]


def test_training_changes_parameters_and_the_average_lags(tmp_path: Path) -> None:
    state = contents(run(tmp_path))
    assert not torch.equal(state["model.first.bias"], Regressor().first.bias)
    assert not torch.equal(state["model.first.bias"], state["policy.first.bias"])
    assert torch.equal(state["average.first.bias"], state["policy.first.bias"])
    assert torch.equal(state["policy.first.weight"], state["policy.second.weight"])
    assert torch.equal(state["policy.frozen"], torch.ones(3)) and "average.frozen" not in state


def _process(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    run(folder, replace(CONFIG, accumulation=2))


def test_two_processes_equal_one_at_the_same_global_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_process, (port, tmp_path / "two"), nprocs=2)
    one = contents(run(tmp_path / "one", replace(CONFIG, accumulation=4)))
    two = contents(tmp_path / "two" / "checkpoints" / "last")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-5, msg=name)
    rows = [read_log(tmp_path / name)[-1] for name in ("one", "two")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"]) and rows[0]["first_row"] == pytest.approx(rows[1]["first_row"])


def test_accumulated_gradient_is_that_of_one_large_batch(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: dict, generator: torch.Generator) -> LossTerms:
        rows = model(batch["inputs"]).square().sum(1)[: batch["count"]]
        return LossTerms(rows.sum(), len(rows))

    def large(index: int) -> dict:
        parts = [batch_source(3 * index + k) for k in range(3)]
        inputs = torch.cat([part["inputs"][: part["count"]] for part in parts])
        return {"inputs": inputs, "count": len(inputs)}

    def trained(source: Callable, accumulation: int) -> Regressor:
        model = Regressor()
        model.dropout.p = 0.0
        config = replace(CONFIG, accumulation=accumulation)
        train(model, loss, source, config, tmp_path / str(accumulation), save_model=save_policy)
        return model

    torch.testing.assert_close(trained(batch_source, 3).first.weight, trained(large, 1).first.weight, atol=1e-6, rtol=1e-5)


def test_signal_finishes_the_step_and_saves(tmp_path: Path) -> None:
    def interrupted_loss(model: nn.Module, batch: dict, generator: torch.Generator) -> LossTerms:
        if len(read_log(tmp_path / "b")) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return noisy_loss(model, batch, generator)

    straight, config = run(tmp_path / "a"), replace(CONFIG, save_every=100)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="000003"):
        run(tmp_path / "b", config, interrupted_loss)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert_equal(contents(straight), contents(run(tmp_path / "b", config, resume=True)))


def test_nan_loss_names_the_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: dict, generator: torch.Generator) -> LossTerms:
        terms = noisy_loss(model, batch, generator)
        return replace(terms, loss_sum=terms.loss_sum * (math_nan if len(read_log(tmp_path)) == 2 else 1.0))

    math_nan = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss is nan .* at step 3.*000002, is intact"):
        run(tmp_path, loss=broken)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000002", "last"]
    assert all(torch.isfinite(value).all() for value in contents(tmp_path / "checkpoints" / "last").values())


def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from multimodal import training_state

    write = training_state.write_tensors

    def full(path: Path, tensors: dict) -> None:
        if "000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(training_state, "write_tensors", full)
    with pytest.raises(OSError, match="disk full while writing .*000004; nothing half-written") as caught:
        run(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000002", "last"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, save_every=1, keep_last=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000003", "000004", "last"]


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Nothing to resume"):
        run(tmp_path, resume=True)
    first = run(tmp_path)
    with pytest.raises(FileExistsError, match="--resume=true"):
        run(tmp_path)
    with pytest.raises(ValueError, match="batch_size was 4, is 8"):
        run(tmp_path, replace(CONFIG, batch_size=8), resume=True)
    assert run(tmp_path, resume=True) == first  # nothing left to do


def test_budget_counts_training_only(tmp_path: Path) -> None:
    def slow_loss(model: nn.Module, batch: dict, generator: torch.Generator) -> LossTerms:
        time.sleep(0.03)
        return noisy_loss(model, batch, generator)

    def validate(folder: Path, step: int) -> dict[str, float]:
        time.sleep(2.0 if step == 2 else 0.0)
        return {"success": 0.5}

    config = replace(CONFIG, steps=None, minutes=1 / 60, save_every=2, warmup_steps=0)
    run(tmp_path, config, slow_loss, on_checkpoint=validate)
    rows = [row for row in read_log(tmp_path) if "loss" in row]
    assert rows[-1]["elapsed"] >= 1.0 > rows[-2]["elapsed"] and len(rows) > 3  # 3 if validation counted
    assert rows[-1]["learning_rate"] < rows[0]["learning_rate"]
    assert {"step": 2, "validation/success": 0.5} in read_log(tmp_path)
    record = json.loads((tmp_path / "checkpoints" / "last" / "training_state" / "position.json").read_text())
    assert record["elapsed"] == rows[-1]["elapsed"]


def test_bf16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    seen = []

    def loss(model: nn.Module, batch: dict, generator: torch.Generator) -> LossTerms:
        seen.append(model.first(batch["inputs"]).dtype)
        return LossTerms(model(batch["inputs"]).square().sum(), 4)

    state = contents(run(tmp_path, replace(CONFIG, precision="bf16"), loss))
    assert set(seen) == {torch.bfloat16} and state["model.first.weight"].dtype == torch.float32


def test_a_run_leaves_log_board_and_curve(tmp_path: Path) -> None:
    run(tmp_path)
    assert (tmp_path / "training_curve.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").iterdir())
    assert {"step", "loss", "learning_rate", "gradient_norm", "samples_per_second"} <= read_log(tmp_path)[0].keys()


def test_error_in_the_data_is_raised_as_it_is(tmp_path: Path) -> None:
    def source(index: int) -> dict:
        if index == 1:
            raise ValueError("camera 'wrist' is missing")
        return batch_source(index)

    with pytest.raises(ValueError, match="camera 'wrist'"):
        train(Regressor(), noisy_loss, source, CONFIG, tmp_path, save_model=save_policy)


def test_decay_falls_on_matrices_only() -> None:
    groups = build_optimizer(Regressor(), CONFIG).param_groups
    assert [{p.ndim for p in group["params"]} for group in groups] == [{2}, {1}]
    assert [group["weight_decay"] for group in groups] == [CONFIG.weight_decay, 0.0]


def test_average_is_the_weighted_sum_of_past_weights() -> None:
    model, decay = nn.Linear(1, 1, bias=False), 0.5
    average, expected = WeightAverage(model, decay), model.weight.item()
    for step, value in enumerate([2.0, -1.0, 0.5]):
        model.weight.data.fill_(value)
        average.update(step)
        expected = expected + (1 - ema_decay(step, decay)) * (value - expected)
    assert float(average.state_dict(model)["weight"]) == pytest.approx(expected)


def test_schedule_warms_up_then_falls_to_its_end() -> None:
    scales = [learning_rate_scale(s, progress(s, 100, 0.0, None), warmup_steps=10, final_scale=0.1) for s in range(101)]
    assert scales[0] == pytest.approx(0.1) and scales[100] == pytest.approx(0.1)
    assert scales[:10] == sorted(scales[:10]) and scales[10:] == sorted(scales[10:], reverse=True)
    assert progress(5, 100, 30.0, 1.0) == 0.5 and progress(80, 100, 30.0, 1.0) == 0.8 and progress(1, None, 90.0, 1.0) == 1.0


def test_config_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match="steps or minutes"):
        TrainingConfig()
    with pytest.raises(ValueError, match="'fp16'; choose one of"):
        TrainingConfig(steps=1, precision="fp16")
    with pytest.raises(ValueError, match="save_every is 0"):
        TrainingConfig(steps=1, save_every=0)
    for spent in ({"steps": 0}, {"steps": -1}, {"minutes": 0.0}, {"steps": 1, "minutes": -1.0}):
        with pytest.raises(ValueError, match=r"(steps|minutes) is (0|-1)"):
            TrainingConfig(**spent)
