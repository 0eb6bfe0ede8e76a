"""Two policies evaluated on the same starts, and compared (`vla compare-policies`): what an export's closed-loop check runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


from sim.compare import Pair, compare, pair_episodes, table, tail
from sim.environment import Environment
from sim.evaluate import EvaluateConfig, check, evaluate, evaluation_name
from sim.policy_source import PolicySource, attacked, load_source
from sim.results import EpisodeRow
from sim.suites import build_environment
from vla.home import remask_home
from vla.policy_folder import StoredPolicy
from vla.show import show

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class ComparePoliciesConfig(EvaluateConfig):
    """Settings of `vla compare-policies`: those of `vla eval`, and a second policy. Both evaluations are folders in output_dir."""

    other: PolicySource = field(default_factory=PolicySource)


def evaluate_both(
    config: ComparePoliciesConfig,
    policies: tuple[StoredPolicy, StoredPolicy],
    *,
    build: Callable[..., Environment] = build_environment,
) -> tuple[list[EpisodeRow], list[EpisodeRow]]:
    """Rows of both, evaluated one after the other; raises what `evaluate` raises."""
    folder = output_folder(config, policies)
    sources = (("policy", config.policy), ("other", config.other))
    first, second = (
        evaluate(replace(config, policy=source, output_dir=folder / name), policy, policy.content_hash, build=build)
        for (name, source), policy in zip(sources, policies, strict=True)
    )
    return first, second


def one_sided_p(pairs: Sequence[Pair]) -> float:
    """McNemar's exact p-value of "the other is no worse": so many discordant starts or more are the first's by chance."""
    found = compare(pairs)
    return tail(found.only_a + found.only_b, found.only_a)


def output_folder(config: ComparePoliciesConfig, policies: tuple[StoredPolicy, StoredPolicy]) -> Path:
    name = evaluation_name(config, "-".join(policy.content_hash[:8] for policy in policies))
    default = remask_home() / "evaluations" / f"compare-{name}"
    return Path(config.output_dir or default).expanduser()


def main(argv: list[str]) -> int:
    """`vla compare-policies`; the exit code is 1 if the other policy is worse beyond chance."""
    from vla.cli import parse_config

    config = parse_config(ComparePoliciesConfig, argv, verb="compare-policies")
    if not config.policy.path or not config.other.path:
        raise ValueError("Which policies? Give --policy.path=A and --other.path=B.")
    check(config)
    policies = tuple(attacked(load_source(source, config.workers), config.attack) for source in (config.policy, config.other))
    pairs = pair_episodes(*evaluate_both(config, policies))
    show(table(pairs, f"B = {config.other.path}\nagainst A = {config.policy.path}"))
    p_value = one_sided_p(pairs)
    verdict = "worse beyond chance" if p_value < SIGNIFICANT else "not worse beyond chance"
    print(f"B is {verdict} (McNemar, one-sided p = {p_value:.3f}). Rows: {output_folder(config, policies)}")
    return int(p_value < SIGNIFICANT)
