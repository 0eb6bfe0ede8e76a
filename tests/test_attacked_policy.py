"""Laws of attacks on a policy: within epsilon of the camera, row by row, through a true gradient, and judged by what it does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from multimodal.bind.adapters import NO_ADAPTERS, AdapterConfig
from multimodal.bind.calibration import InnerAttackConfig
from multimodal.config import ImageConfig
from multimodal.images import prepare_images, prepare_pixels
from multimodal.schedule import TrainingConfig
from sim.evaluate import EvaluateConfig, output_dir
from sim.policy_source import attacked
from tests.reaching import SPEC, write_cache
from tests.tiny_policy import ACTION_HORIZON, observations, write_policy
from vla.attacked_policy import AttackedPolicy, PolicyAttackConfig, check_attack
from vla.calibrate_policy import CalibratePolicyConfig, TokenMap, TokenMapLoss, calibrate_policy, held_out_frames, measure
from vla.data import ActionWindows
from vla.decision import known_actions
from vla.frame_cache import FrameCache
from vla.merge import PolicyPath
from vla.model import VLA
from vla.policy import PolicyAssets, TorchPolicy, load_policy
from vla.train import DatasetConfig

UNTARGETED = PolicyAttackConfig(epsilon=8, steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture
def policy(folder: Path) -> TorchPolicy:
    return load_policy(folder, decode={"token_temperature": 0.0})


def with_head(folder: Path, kind: str) -> TorchPolicy:
    """The tiny policy's shapes under another head, fresh weights."""
    assets, _ = PolicyAssets.load(folder)
    slots = "steps" if kind in ("l1", "flow") else "tokens"
    assets = replace(assets, head=replace(assets.head, type=kind), model=replace(assets.model, slots=slots))
    torch.manual_seed(0)
    return TorchPolicy(assets, VLA(assets.model))


@pytest.mark.parametrize(
    "config", [ImageConfig(crop=32), ImageConfig(crop=30, size=20), ImageConfig(crop=36, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))]
)
def test_float_frames_are_prepared_as_the_policy_prepares_its_own(config: ImageConfig) -> None:
    frames = torch.randint(0, 256, (2, 2, 36, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    points = frames.float().requires_grad_()
    prepared = prepare_pixels(points, config)
    assert torch.allclose(prepared, prepare_images(frames, config), atol=1e-5)
    prepared.sum().backward()
    assert points.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["untargeted", "noise"])
def test_frames_stay_within_epsilon_and_everything_else_as_it_was(policy: TorchPolicy, kind: str) -> None:
    seen = observations(2)
    seen[0].images["base"][:] = 255  # at the end of the range
    attacker = AttackedPolicy(policy, PolicyAttackConfig(kind, epsilon=3, steps=2))
    nothing = known_actions([None] * 2, ACTION_HORIZON, SPEC.action_dim)
    shown = attacker.attack(seen, policy.decide(seen, nothing, [0, 1]), [0, 1])
    for before, after in zip(seen, shown, strict=True):
        assert after.instruction == before.instruction and np.array_equal(after.state, before.state)
        for camera in SPEC.cameras:
            moved = after.images[camera].astype(int) - before.images[camera]
            assert after.images[camera].dtype == np.uint8 and np.abs(moved).max() <= 3 and np.abs(moved).max() > 0


def test_epsilon_zero_is_the_policy_itself(policy: TorchPolicy) -> None:
    seen = observations(2)
    clean = policy.act(seen, seeds=[3, 4])
    under = AttackedPolicy(policy, replace(UNTARGETED, epsilon=0)).act(seen, seeds=[3, 4])
    for a, b in zip(clean, under, strict=True):
        assert np.array_equal(a.actions, b.actions) and b.info["deviation"] == 0.0


def test_a_row_does_not_depend_on_its_batch_mates(policy: TorchPolicy) -> None:
    attacker, seen = AttackedPolicy(policy, UNTARGETED), observations(3)
    together = attacker.act(seen, seeds=[5, 6, 7])
    alone = attacker.act(seen[1:2], seeds=[6])[0]
    assert np.abs(together[1].actions - alone.actions).max() < 1e-3


@pytest.mark.parametrize("kind", ["discrete_diffusion", "parallel", "autoregressive", "l1", "flow"])
def test_the_attack_moves_what_every_head_expects(folder: Path, kind: str) -> None:
    """More than random noise of the same size, on the expected actions that it attacks."""
    policy, seen, seeds = with_head(folder, kind), observations(2), [0, 1]
    nothing = known_actions([None] * 2, ACTION_HORIZON, SPEC.action_dim)
    moved = {}
    for attack in ("untargeted", "noise"):
        attacker = AttackedPolicy(policy, PolicyAttackConfig(attack, epsilon=8, steps=5))
        clean = policy.decide(seen, nothing, seeds)
        loss = attacker._loss(seen, clean, seeds)
        frames = torch.as_tensor(np.stack([attacker._frames(item) for item in attacker.attack(seen, clean, seeds)])).float()
        with torch.no_grad():
            moved[attack] = float(loss(frames)[0].mean())
    assert moved["untargeted"] > moved["noise"] + 1e-4, moved


def test_a_targeted_attack_comes_nearer_to_the_other_instruction(policy: TorchPolicy) -> None:
    seen, other = observations(2), "stay where you are"
    attacker = AttackedPolicy(policy, PolicyAttackConfig("targeted", epsilon=16, steps=8, instruction=other))
    nothing = known_actions([None] * 2, ACTION_HORIZON, SPEC.action_dim)
    clean = policy.decide(seen, nothing, [0, 0])
    loss = attacker._loss(seen, clean, [0, 0])
    before = torch.as_tensor(np.stack([attacker._frames(item) for item in seen])).float()
    after = torch.as_tensor(np.stack([attacker._frames(item) for item in attacker.attack(seen, clean, [0, 0])])).float()
    with torch.no_grad():
        assert bool((loss(after)[0] > loss(before)[0]).all())
    with pytest.raises(ValueError, match="episode's own"):
        attacker.act([replace(seen[0], instruction=other)])


def test_settings_that_do_not_fit_are_refused(policy: TorchPolicy) -> None:
    with pytest.raises(ValueError, match="untargeted, targeted, noise"):
        PolicyAttackConfig("fgsm")
    with pytest.raises(ValueError, match="whole number of grey levels"):
        PolicyAttackConfig(epsilon=0.5)
    with pytest.raises(ValueError, match="wrong object"):
        PolicyAttackConfig("targeted")
    with pytest.raises(ValueError, match="no setting 'eps'.*epsilon"):
        check_attack({"eps": 4})
    with pytest.raises(ValueError, match="checkpoint folder"):
        AttackedPolicy(object(), UNTARGETED)


def test_vla_eval_takes_an_attack(policy: TorchPolicy) -> None:
    under = attacked(policy, {"kind": "untargeted", "epsilon": 2, "steps": 1})
    assert under.content_hash == f"{policy.content_hash}-untargeted-2-1" and attacked(policy, {}) is policy


def test_an_attack_s_settings_tell_its_policy_and_its_folder_from_another_s(policy: TorchPolicy) -> None:
    one = {"kind": "targeted", "epsilon": 4, "steps": 10, "instruction": "Pick up  the can"}
    others = [one | change for change in ({"epsilon": 2}, {"steps": 5}, {"instruction": "open the drawer"})]
    attacks = [{"kind": "noise"}, {"epsilon": 4}, one, *others]
    assert len({attacked(policy, attack).content_hash for attack in attacks} | {policy.content_hash}) == 7
    folders = [output_dir(EvaluateConfig(attack=attack), "abcdefgh").name for attack in ({}, *attacks)]
    assert len(set(folders)) == 7 and folders[3].endswith("-abcdefgh-targeted-4-10-pick-up-the-can")
    assert output_dir(EvaluateConfig(attack={"steps": 10}), "abcdefgh").name == folders[2]  # defaults named or not


def test_a_calibrated_policy_differs_in_its_tower_only_and_drifts_less(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write_cache(tmp_path / "data", episodes=3, length=6)
    config = CalibratePolicyConfig(
        policy=PolicyPath(str(folder)),
        dataset=DatasetConfig(root=data, held_out_fraction=0.2),  # the first episode
        adapters=AdapterConfig(lora_rank=2, tune_norms=True),
        attack=InnerAttackConfig(epsilon=8.0, steps=2),
        training=TrainingConfig(steps=12, batch_size=4, learning_rate=5e-3, warmup_steps=2, ema_decay=0.0, device="cpu"),
        output_dir=tmp_path / "run",
    )
    calibrated = calibrate_policy(config)
    (_, before), (assets, after) = PolicyAssets.load(folder), PolicyAssets.load(calibrated)
    assert before.keys() == after.keys() and assets.provenance["calibrated"]["from"] == str(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("vlm.vision.") for name in changed)
    kept = ActionWindows(FrameCache.open(data), ACTION_HORIZON, held_out_fraction=0.2, held_out=True)
    frames = held_out_frames(load_policy(folder), [kept])
    assert len(frames) == 6 and np.array_equal(frames, kept.gather(np.arange(6)).images)
    frozen = TokenMap(load_policy(folder).model.vlm.vision, assets.images, NO_ADAPTERS, seed=0)
    merged = TokenMap(load_policy(folder).model.vlm.vision, assets.images, NO_ADAPTERS, seed=0)
    merged.tower = load_policy(calibrated).model.vlm.vision.eval()
    loss = TokenMapLoss(config.attack)
    drift = [measure(each, loss, frames)["attacked_drift"] for each in (frozen, merged)]
    assert drift[1] < drift[0] and measure(frozen, loss, frames, batch=6)["clean_drift"] == 0
    shown = capsys.readouterr().out
    assert f"attacked_drift {drift[0]:.4f} -> " in shown and "on 6 held-out windows" in shown
    assert load_policy(calibrated).act(observations(1))[0].actions.shape == (ACTION_HORIZON, SPEC.action_dim)
