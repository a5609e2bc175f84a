"""Decisions against their baselines. Writes docs/decisions.md.

Run from the repository: ``nice python benchmarks/decisions.py`` (an hour on one core, with a few
minutes more to train the networks, whose weights stay in ``benchmarks/cache``). What was measured of a
network is kept there too; ``--fresh`` measures anew.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from decisions_baselines import Array, Batches, block_influence, from_gradients
from decisions_networks import (
    BLOCKS,
    BUILDERS,
    CACHE,
    DEVELOPMENT,
    UNTOUCHED,
    accuracy,
    load,
    right,
    train,
)
from decisions_page import write
from scipy.stats import spearmanr
from torch import nn

from lightning_koopman import (
    Options,
    bit_widths,
    component_effects,
    credit_report,
    drift,
    drop_order,
    linearize,
)
from lightning_koopman.decisions.bits import improve, solve_exactly
from lightning_koopman.decisions.linear import _measure_of
from lightning_koopman.decisions.linear_maps import Maps
from lightning_koopman.decisions.linear_search import Option, Search
from lightning_koopman.decisions.steps import cost_of
from lightning_koopman.decisions.swaps import Skipped, copied_with, swapped
from lightning_koopman.effects.replacements import quantized_weights
from lightning_koopman.effects.scoring import Measured, Outputs, over_draws
from lightning_koopman.network.runs.forward_runner import ForwardRunner

BITS = (4, 3, 2)
RANDOM = 10
ALIKE = "measured, samples drawn alike"
Found = dict[str, Any]
Choice = tuple[int, ...]

OPTIONS = Options(max_dim=256)
"""States as wide as they were by default when the page was written."""


class Against:
    """A network on some samples, which others are set against, with one pass each."""

    def __init__(self, net: nn.Module, batches: Batches) -> None:
        self.batches, self.right = batches, right(net, batches)
        self.outputs = Outputs(ForwardRunner(net, batches).run(), batches, "kl")

    def moved(self, other: nn.Module) -> Array:
        """The divergence of another network's classes from those of the first, by sample."""
        return self.outputs.compare(ForwardRunner(other, self.batches).run()).moved.numpy()

    def judge(self, other: nn.Module) -> tuple[tuple[float, float], tuple[float, float]]:
        """The mean divergence of another network's classes, and its accuracy, with their errors."""
        change = self.outputs.compare(ForwardRunner(other, self.batches).run())
        assert change.gained is not None
        return scored(change.moved.numpy()), scored(self.right + change.gained.numpy())


def scored(right: Array) -> tuple[float, float]:
    """Mean over samples, and its error."""
    return float(right.mean()), float(right.std(ddof=1) / math.sqrt(len(right)))


def first(batches: Batches, samples: int) -> Batches:
    """As many batches as hold no more samples than that."""
    counts = itertools.accumulate(len(y) for _, y in batches)
    return [batch for batch, count in zip(batches, counts, strict=True) if count <= samples]


def sizes(data: dict[str, Batches]) -> dict[str, int]:
    return {part: sum(len(y) for _, y in batches) for part, batches in data.items()}


def without(net: nn.Module, names: Sequence[str]) -> nn.Module:
    return copied_with(net, [Skipped([name]) for name in names])


def greedy(net: nn.Module, batches: Batches, names: Sequence[str], count: int) -> list[str]:
    """Drop whichever block leaves the best accuracy, again and again."""
    gone: list[str] = []
    for _ in range(count):
        left = [name for name in names if name not in gone]
        gone.append(max(left, key=lambda name: accuracy(without(net, [*gone, name]), batches)))
    return gone


def drop(name: str, net: nn.Module, data: dict[str, Batches]) -> Found:
    """Drop half of the blocks, and three quarters."""
    choose, test = data["choose"], data["test"]
    start = time.process_time()
    count = {"minilm": 3, "efficientnet": 4}.get(name, BLOCKS // 2)
    levels = {"half": count, "three quarters": count + count // 2}
    order = drop_order(net, choose, steps=levels["three quarters"])
    names = order.candidates
    seconds = time.process_time() - start
    report = credit_report(net, choose, options=OPTIONS)
    credit = {n: float(c) for n, c in zip(report.components, report.credit, strict=True)}
    numbers = from_gradients(net, choose, names, {8: quantized_weights(net, 8)})
    scores = {
        "effect, once": order.remaining[0],
        "Block Influence": block_influence(net, choose, names),
        "gradient × weight": numbers["gradient × weight"],
        "Taylor": numbers["taylor"],
        "magnitude": numbers["magnitude"],
        "depth": -np.arange(len(names), dtype=float),
        "credit": np.array([credit.get(n, math.nan) for n in names]),
    }
    whole = Against(net, test)
    truth = [whole.moved(without(net, [n])).mean() for n in names]
    orders = {"drop_order": list(order.components)}
    orders |= {m: [names[i] for i in np.argsort(v, kind="stable")] for m, v in scores.items()}
    orders["greedy measured"] = greedy(net, first(choose, 512), names, levels["three quarters"])
    rng = np.random.default_rng(0)
    draws = [list(rng.permutation(names)) for _ in range(RANDOM)]
    kept, errors, gap = {}, {}, {}

    @functools.cache  # several methods drop the same blocks
    def right_without(gone: frozenset[str]) -> Array:
        return right(without(net, sorted(gone)), test)

    for level, n in levels.items():
        found = {m: right_without(frozenset(gone[:n])) for m, gone in orders.items()}
        found["random"] = np.mean([right_without(frozenset(gone[:n])) for gone in draws], axis=0)
        kept[level] = {m: scored(own)[0] for m, own in found.items()}
        errors[level] = {m: scored(own)[1] for m, own in found.items()}
        gap[level] = scored(found["drop_order"] - found["greedy measured"])
    return {
        "whole": float(whole.right.mean()),
        "samples": sizes(data),
        "blocks": len(names),
        "dropped": levels,
        "kept": kept,
        "errors": errors,
        "gap": gap,
        "spearman": {m: float(spearmanr(s, truth).statistic) for m, s in scores.items()},
        "seconds": seconds,
    }


def redivided(choose: Array, test: Array, divisions: int = 200) -> tuple[float, float]:
    """What measuring reaches if the samples to choose on and those to test are drawn alike.

    The effects by component and sample of both are thrown together and divided anew, in the same
    numbers. Returns the mean rank correlation of the means over both parts, and how often the ratio of
    their sizes, as a geometric mean over components, is within 0.8 and 1.25.
    """
    both, count = np.concatenate([choose, test], axis=1), choose.shape[1]
    rng = np.random.default_rng(0)
    ranks, within = [], []
    for _ in range(divisions):
        order = rng.permutation(both.shape[1])
        a, b = both[:, order[:count]].mean(1), both[:, order[count:]].mean(1)
        ranks.append(float(spearmanr(a, b).statistic))
        within.append(abs(np.mean(np.log(a / b))) <= math.log(1.25))
    return float(np.mean(ranks)), float(np.mean(within))


def searched(score: Array, costs: Array, allowed: float, measure: Callable[..., Measured]) -> Choice:
    """Improve what single numbers choose by measured changes, as ``bit_widths`` does."""
    chosen = solve_exactly(score, costs, allowed)
    apart = np.diag(score.reshape(-1)).reshape(*score.shape, *score.shape)
    return improve(apart, costs, allowed, (chosen, measure(chosen)), measure)[0]


def quantise(name: str, net: nn.Module, data: dict[str, Batches]) -> Found:
    """Rank components by what rounding them does, and give each its bits."""
    choose, test = data["choose"], data["test"]
    options = (8, *BITS)
    start = time.process_time()
    found = bit_widths(net, choose, bits=options, average=3.0, samples=100_000)
    seconds = time.process_time() - start
    names, counts = found.components, np.array(found.weights, dtype=float)
    rounded = {b: quantized_weights(net, b) for b in options}
    report, only = (
        (None, None) if name == "minilm" else (credit_report(net, choose, options=OPTIONS), list(names))
    )
    kinds = {f"int{b}": rounded[b] for b in BITS}
    told = component_effects(
        net, choose, report, (), how="predicted", replacements=kinds, components=only, samples=100_000
    )
    places = [told.components.index(n) for n in names]
    baselines = from_gradients(net, choose, names, rounded)
    scores: dict[str, Array] = {"measured effect": found.effects}
    scores["predicted effect"] = np.stack(
        [np.zeros(len(names)), *(told.values[f"int{b}"][places] for b in BITS)], axis=1
    )
    scores |= {m: baselines[m] for m in ("hawq", "(g·Δ)²", "MSE", "weight norm")}

    def with_bits(bits: Mapping[str, int]) -> nn.Module:
        values = {
            key: rounded[b][key]
            for n, b in bits.items()
            for key in rounded[b]
            if key.startswith(tuple(f"{part}." for part in found.parts[n]))
        }
        other = copy.deepcopy(net)
        other.load_state_dict(net.state_dict() | values)
        return other

    chosen_on, tested = Against(net, choose), Against(net, test)
    spearman, size, alike = {}, {}, {}
    for b in BITS:
        before, after = (
            np.stack([part.moved(with_bits({n: b})) for n in names]) for part in (chosen_on, tested)
        )
        real, column = after.mean(1), options.index(b)
        spearman[b] = {m: float(spearmanr(s[:, column], real).statistic) for m, s in scores.items()}
        spearman[b][ALIKE], alike[b] = redivided(before, after)
        size[b] = {
            m: float(np.exp(np.mean(np.log(scores[m][:, column] / real))))
            for m in ("measured effect", "predicted effect", "(g·Δ)²")
        }
    costs, allowed = np.outer(counts, options), 3.0 * counts.sum()

    def of(choice: Choice) -> dict[str, int]:
        return {n: options[k] for n, k in zip(names, choice, strict=True)}

    @functools.cache
    def measure(choice: Choice) -> Measured:
        runner = ForwardRunner(with_bits(of(choice)), choose)
        return over_draws([chosen_on.outputs.compare(runner.run())])

    bits = {"bit_widths": dict(zip(names, found.bits, strict=True))}
    bits |= {method: of(solve_exactly(score, costs, allowed)) for method, score in scores.items()}
    bits["hawq, then the same search"] = of(searched(scores["hawq"], costs, allowed, measure))
    bits["3 bits everywhere"] = dict.fromkeys(names, 3)
    judged = {method: tested.judge(with_bits(each)) for method, each in bits.items()}
    accurate = {m: own for m, (_, own) in judged.items()} | {"whole": scored(tested.right)}
    return {
        "components": len(names),
        "spearman": spearman,
        "size": size,
        "alike": alike,
        "mixed": {m: value for m, ((value, _), _) in judged.items()},
        "mixed errors": {m: error for m, ((_, error), _) in judged.items()},
        "accuracy": {m: value for m, (value, _) in accurate.items()},
        "accuracy errors": {m: error for m, (_, error) in accurate.items()},
        "seconds": seconds,
    }


def cheaper_choice(search: Search, options: Sequence[Option], flops: int) -> tuple[int, int]:
    """Try all sets of blocks that need fewer operations, the cheapest first, until one is admitted.

    Returns its operations, or those given if there is none, and how many were tried. A map saves alike
    wherever others are, so that the operations of a set are known from its groups of neighbours.
    """
    whole, saved = search._whole.flops, {}
    for i, j in itertools.combinations(range(len(options) + 1), 2):
        (group,) = search.groups(options[i:j])
        with swapped(search._runner.model, search._maps.swaps([group])):
            saved[group] = whole - cost_of(search._runner).flops
    sets = [c for n in range(len(options) + 1) for c in itertools.combinations(options, n)]
    costs = {chosen: whole - sum(saved[g] for g in search.groups(chosen)) for chosen in sets}
    cheaper = sorted((c for c in sets if costs[c] < flops), key=costs.__getitem__)
    for count, chosen in enumerate(cheaper):
        if search._fits(search._try(chosen)[0]):
            return costs[chosen], count + 1
    return flops, len(cheaper)


def linear(name: str, net: nn.Module, data: dict[str, Batches]) -> Found:
    """Make as much linear as keeps the accuracy within 0.01."""
    choose, test = data["choose"], data["test"]
    fit_on = data["train"][:4]
    blocks = [str(i) for i in range(1, BLOCKS + 1)]
    start = time.process_time()
    how = {"fit_batches": fit_on, "components": blocks, "samples": 1000}
    found = linearize(net, choose, **how)
    seconds = time.process_time() - start
    before = right(net, test)
    cost = found.costs[-1] if found.costs else found.cost_before
    result = {"linearize": (cost, scored(right(found.model, test) - before), len(found.components))}
    runner = ForwardRunner(net, choose)
    net.eval()
    with torch.no_grad():
        maps = Maps(ForwardRunner(net, fit_on), 256, 0.999)
        maps.check(maps.look_at({block: (block,) for block in blocks}), runner)
        outputs = Outputs(runner.run(), runner.batches, None)
        search = Search(runner, outputs, maps, 0.01, _measure_of("flops"), 0.0, False)
        search._order = blocks
        rng = np.random.default_rng(0)
        orders = {"depth": blocks[::-1], "first layers first": blocks}
        orders |= {f"random {i}": list(rng.permutation(blocks)) for i in range(2)}
        for label, order in orders.items():
            options = [Option(block, maps.forms((block,), False)[-1]) for block in order]
            chosen = search.take(options)
            new = copied_with(net, maps.swaps(search.groups(chosen)))
            cost = cost_of(ForwardRunner(new, choose))
            result[label] = (cost, scored(right(new, test) - before), len(chosen))
        options = [Option(block, maps.forms((block,), False)[-1]) for block in blocks]
        cheapest, tried = cheaper_choice(search, options, result["linearize"][0].flops)
    whole = found.cost_before
    return {
        "flops": {k: c.flops / whole.flops for k, (c, _, _) in result.items()},
        "parameters": {k: c.parameters / whole.parameters for k, (c, _, _) in result.items()},
        "gained": {k: a for k, (_, a, _) in result.items()},
        "count": {k: n for k, (_, _, n) in result.items()},
        "time": found.seconds[1] / found.seconds[0],
        "slower": found.slower,
        "cheapest": cheapest / whole.flops,
        "tried": tried,
        "seconds": seconds,
    }


def other_digits(data: dict[str, Batches]) -> dict[str, Batches]:
    """The digits turned by a quarter, of which there are few to train on."""

    def turn(batches: Batches) -> Batches:
        return [(torch.rot90(x, 1, (2, 3)), y) for x, y in batches]

    return {"few": turn(data["train"][-2:]), "test": turn(data["test"])}


def freeze(name: str, net: nn.Module, data: dict[str, Batches]) -> Found:
    """Fine-tune on few turned digits with half of the blocks frozen."""
    other = other_digits(data)
    blocks = [str(i) for i in range(1, BLOCKS + 1)]
    half = BLOCKS // 2
    effects = component_effects(
        net, other["few"], credit_report(net, data["choose"], options=OPTIONS), ("skip",)
    )
    effect = {n: float(v) for n, v in zip(effects.components, effects.values["skip"], strict=True)}
    before = credit_report(net, data["choose"], options=OPTIONS)
    tuned = copy.deepcopy(net)
    train(tuned, other["few"], 2, 0, 1e-3)
    moved = drift(before, tuned, other["few"])
    shift = {n: float(v) for n, v in zip(moved.components, moved.drift, strict=True)}
    probe = copy.deepcopy(net).requires_grad_(True)
    x, y = torch.cat([x for x, _ in other["few"]]), torch.cat([y for _, y in other["few"]])
    torch.nn.functional.cross_entropy(probe(x), y).backward()
    slope = {b: sum(float(p.grad.square().sum()) for p in probe[int(b)].parameters()) for b in blocks}
    rng = np.random.default_rng(0)

    def least(score: dict[str, float]) -> list[str]:
        return sorted(blocks, key=lambda block: score[block])[:half]

    choices = {
        "nothing frozen": [],
        "first half": blocks[:half],
        "last half": blocks[half:],
        "least gradient": least(slope),
        "least drift after two epochs": least(shift),
        "least effect of skip": least(effect),
        "largest effect of skip": least({n: -v for n, v in effect.items()}),
        "all blocks": blocks,
    } | {f"random {i}": list(rng.choice(blocks, half, replace=False)) for i in range(2)}
    reached = {}
    for label, frozen in choices.items():
        new = copy.deepcopy(net).requires_grad_(True)
        for block in frozen:
            new[int(block)].requires_grad_(False)
        train(new, other["few"], 8, 0, 1e-3)
        reached[label] = accuracy(new, other["test"])
    reached["random half"] = float(np.mean([reached.pop(f"random {i}") for i in range(2)]))
    return {"untuned": accuracy(net, other["test"]), "reached": reached}


DECISIONS: dict[str, Callable[[str, nn.Module, dict[str, Batches]], Found]] = {
    "drop": drop,
    "quantise": quantise,
    "linear": linear,
    "freeze": freeze,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fresh", action="store_true", help="measure what was measured before")
    parser.add_argument("--page", action="store_true", help="write the page from what is measured")
    parser.add_argument("--only", nargs="*", help="networks such as mlp-1; nothing is written then")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    CACHE.mkdir(exist_ok=True)
    seeds = (*DEVELOPMENT, *UNTOUCHED)
    networks = [*itertools.product(BUILDERS, seeds), ("minilm", 0), ("efficientnet", 0)]
    results: dict[str, dict[str, Found]] = {}
    for name, seed in networks:
        key = f"{name}-{seed}"
        if given.only and key not in given.only:
            continue
        own = list(DECISIONS) if name in BUILDERS else ["drop", "quantise"]
        for decision in own:
            path = CACHE / f"{decision}-{key}.json"
            if given.page and not path.exists():
                continue
            if given.fresh or not path.exists():
                net, data = load(name, seed)
                start = time.process_time()
                found = DECISIONS[decision](name, net, data)
                found["took"] = time.process_time() - start
                path.write_text(json.dumps(found))
                print(key, decision, f"{found['took']:.0f} s", flush=True)
            results.setdefault(decision, {})[key] = json.loads(path.read_text())
    if not given.only:
        write(results)


if __name__ == "__main__":
    main()
