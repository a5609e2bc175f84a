"""Decisions against their baselines. Writes docs/decisions.md.

Run from the repository: ``nice python benchmarks/decisions.py`` (half an hour on one core, with a few
minutes more to train the networks, whose weights stay in ``benchmarks/cache``). What was measured of a
network is kept there too; ``--fresh`` measures anew.
"""

import argparse
import copy
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
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

from lightning_koopman import bit_widths, component_effects, credit_report, drift, drop_order, linearize
from lightning_koopman.decisions.bits import solve_exactly
from lightning_koopman.decisions.linear import _Maps, _measure_of, _Option, _Search
from lightning_koopman.decisions.steps import cost_of
from lightning_koopman.decisions.swaps import Skipped, copied_with, swapped
from lightning_koopman.effects.replacements import quantized_weights
from lightning_koopman.effects.scoring import Outputs, over_draws
from lightning_koopman.network.forward_runner import ForwardRunner

BITS = (4, 3, 2)
RANDOM = 10
Found = dict[str, Any]


def kl(net: nn.Module, other: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean divergence of another network's classes from those of the first, and its error."""
    before = Outputs(ForwardRunner(net, batches).run(), batches, "kl")
    return over_draws([before.compare(ForwardRunner(other, batches).run())])[:2]


def scored(right: Array) -> tuple[float, float]:
    """Mean over samples, and its error."""
    return float(right.mean()), float(right.std(ddof=1) / math.sqrt(len(right)))


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
    report = credit_report(net, choose)
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
    truth = [kl(net, without(net, [n]), test)[0] for n in names]
    orders = {"drop_order": list(order.components)}
    orders |= {m: [names[i] for i in np.argsort(v, kind="stable")] for m, v in scores.items()}
    orders["greedy measured"] = greedy(net, choose[:2], names, levels["three quarters"])
    rng = np.random.default_rng(0)
    draws = [list(rng.permutation(names)) for _ in range(RANDOM)]
    kept, errors, gap = {}, {}, {}
    for level, n in levels.items():
        found = {m: right(without(net, gone[:n]), test) for m, gone in orders.items()}
        found["random"] = np.mean([right(without(net, gone[:n]), test) for gone in draws], axis=0)
        kept[level] = {m: scored(own)[0] for m, own in found.items()}
        errors[level] = {m: scored(own)[1] for m, own in found.items()}
        gap[level] = scored(found["drop_order"] - found["greedy measured"])
    return {
        "whole": accuracy(net, test),
        "blocks": len(names),
        "dropped": levels,
        "kept": kept,
        "errors": errors,
        "gap": gap,
        "spearman": {m: float(spearmanr(s, truth).statistic) for m, s in scores.items()},
        "seconds": seconds,
    }


def quantise(name: str, net: nn.Module, data: dict[str, Batches]) -> Found:
    """Rank components by what rounding them does, and give each its bits."""
    choose, test = data["choose"], data["test"]
    options = (8, *BITS)
    start = time.process_time()
    found = bit_widths(net, choose, bits=options, average=3.0, samples=100_000)
    seconds = time.process_time() - start
    names, counts = found.components, np.array(found.weights, dtype=float)
    rounded = {b: quantized_weights(net, b) for b in options}
    kinds = {f"int{b}": rounded[b] for b in BITS}
    report = credit_report(net, choose)
    how = {"replacements": kinds, "components": list(names), "samples": 100_000}
    if name == "minilm":
        report, how["components"] = None, None
    truth = component_effects(net, test, report, (), how="measured", **how)
    told = component_effects(net, choose, report, (), how="predicted", **how)
    places = [truth.components.index(n) for n in names]
    baselines = from_gradients(net, choose, names, rounded)
    scores: dict[str, Array] = {"measured effect": found.effects}
    scores["predicted effect"] = np.stack(
        [np.zeros(len(names)), *(told.values[f"int{b}"][places] for b in BITS)], axis=1
    )
    scores |= {m: baselines[m] for m in ("hawq", "(g·Δ)²", "MSE", "weight norm")}
    spearman, size = {}, {}
    for b in BITS:
        real, column = truth.values[f"int{b}"][places], options.index(b)
        spearman[b] = {m: float(spearmanr(s[:, column], real).statistic) for m, s in scores.items()}
        size[b] = {
            m: float(np.exp(np.mean(np.log(scores[m][:, column] / real))))
            for m in ("measured effect", "predicted effect", "(g·Δ)²")
        }
    costs, allowed = np.outer(counts, options), 3.0 * counts.sum()
    networks = {"bit_widths": found.apply(net)}
    for method, score in scores.items():
        chosen = solve_exactly(score, costs, allowed)
        other = copy.deepcopy(net)
        values = {
            key: rounded[options[k]][key]
            for n, k in zip(names, chosen, strict=True)
            for key in rounded[8]
            if key.startswith(f"{n}.")
        }
        other.load_state_dict(net.state_dict() | values)
        networks[method] = other
    networks["3 bits everywhere"] = copy.deepcopy(net)
    networks["3 bits everywhere"].load_state_dict(net.state_dict() | dict(rounded[3]))
    mixed = {m: kl(net, other, test) for m, other in networks.items()}
    accurate = {m: scored(right(other, test)) for m, other in {**networks, "whole": net}.items()}
    return {
        "components": len(names),
        "spearman": spearman,
        "size": size,
        "mixed": {m: value for m, (value, _) in mixed.items()},
        "mixed errors": {m: error for m, (_, error) in mixed.items()},
        "accuracy": {m: value for m, (value, _) in accurate.items()},
        "accuracy errors": {m: error for m, (_, error) in accurate.items()},
        "seconds": seconds,
    }


def cheaper_choice(search: _Search, options: Sequence[_Option], flops: int) -> tuple[int, int]:
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
        maps = _Maps(ForwardRunner(net, fit_on), 256, 0.999, 0)
        maps.check({block: (block,) for block in blocks})
        outputs = Outputs(runner.run(), runner.batches, None)
        search = _Search(runner, outputs, maps, True, 0.01, _measure_of("flops"), 0.0, False)
        search._order = blocks
        rng = np.random.default_rng(0)
        orders = {"depth": blocks[::-1], "first layers first": blocks}
        orders |= {f"random {i}": list(rng.permutation(blocks)) for i in range(2)}
        for label, order in orders.items():
            options = [_Option(block, maps.forms((block,), False)[-1]) for block in order]
            chosen = search.take(options)
            new = copied_with(net, maps.swaps(search.groups(chosen)))
            cost = cost_of(ForwardRunner(new, choose))
            result[label] = (cost, scored(right(new, test) - before), len(chosen))
        options = [_Option(block, maps.forms((block,), False)[-1]) for block in blocks]
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
    effects = component_effects(net, other["few"], credit_report(net, data["choose"]), ("skip",))
    effect = {n: float(v) for n, v in zip(effects.components, effects.values["skip"], strict=True)}
    before = credit_report(net, data["choose"])
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
