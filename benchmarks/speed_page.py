"""The text around the figures of ``benchmarks/speed.py``."""

PAGE = """# Speed

Written by `benchmarks/speed.py` (`python benchmarks/speed.py docs/speed.md`, with the extra
`benchmarks` and `OMP_NUM_THREADS=1`; about 50 minutes of a core). Two virtual cores of an AMD EPYC
(Zen 5, AVX-512), no GPU, one thread, torch <torch>. Seconds are processor seconds of the measuring
process, both sides of a ratio were measured in turn in one run, and the median is taken over
neighbours. Other work ran on the other core, and one and the same pass takes up to 1.6 times as long by
what neighbours do: trust the ratios, not the seconds. Operator fits and their residuals are of an
Intel Xeon with AVX-512, and are not concerned by what changed since.

## One report over all components against the plain forward pass

The same batches run through the network alone, and through `credit_report(..., max_samples=None)`: all
components, all samples, 5 folds, error bars. The last column is a report as it is by default, which
looks at enough samples (in brackets), over a forward pass of all of them. States are at most 128 wide,
the default; with 256, the default up to 0.2.0, the same six took 18.1, 8.57, 2.40, 2.01, 1.26 and 14.0
passes on this machine ([what that decides](widths.md)).

<!-- reports -->
<!-- end -->

Nine more processes gave 11.8 to 12.4 for the MLP's 4,096 samples, so the target is met in most and not
in all; the version before gave 11.9 to 12.4 in turns with three of them, and 11.6 to 13.5 on other days:
what differs is the machine. Its 50,000 samples took 6.46 to 6.57, and with the version before 6.57 to
6.71. Six more processes gave 1.47 to 1.54 for the convolutions and 1.27 to 1.31 for ResNet-18.

Left alone, glibc hands back behind each layer the memory of states as large as those of the convolutions
(12.8 MB each), in some processes, and in others not. It learns what to keep from the largest block that
was freed, so each report frees one of 32 MiB first, which nobody wrote to. In turns with the version
before, three processes each, the convolutions' own pass took 0.53 to 0.54 s for 1.03 to 1.05, their
report 0.77 to 0.83 for 1.03 to 1.29, and a report of ResNet-18, whose pass alone was not concerned, 1.30
to 1.31 passes for 1.39 to 1.46. Trainings of the demo's CNN, whose states are smaller, took as long with
it.

The floor is what the library calls alone take by which a report's numbers are defined, over the forward
pass, each part the least of five runs: 1 for the pass itself; one pooling of each state and its
projection; the products of all states in float64; one eigendecomposition in float32 of the Gram matrix
of the first 256 samples for each state wider than `max_dim`; and what each component takes. That is one
eigendecomposition and one alignment of all samples, and for each of five folds a Cholesky factorisation
and solution, the products of held-out errors (of the step, and of the chain behind it), a product and a
factorisation for the volume, and a factorisation for the rank, all at most 128 wide. A target below its
floor is out of reach. That of the convolutions is on it: another process gave a floor of 1.27, and one
of 5.32 for all 50,000 samples.

Above the floor are, for each sample, copies, hashes that tell the folds and hooks in Python, and for
each component the copies of moments less those of a fold, solutions under a second ridge weight, the
inverse that a rank takes, and small operations. What drift is measured against is fitted when something
is held against the report, not in each. Where matrices are up to 229 wide, all five folds are left out
at once: credits of six layers take 0.70 (width 64), 0.79 (96), 0.86 (128), 0.84 (160) and 0.93 (192) of
the time that one fold after the other takes, their point values 0.61, 0.74, 0.86, 0.83 and 0.86.

Symmetric products are made in strips, of 32 columns: 819 samples of width 128 take 0.44 ms, by one
product 0.58; of width 256 1.45 and 2.19. A product of 819 samples of widths 128 and 10 takes 0.08 ms
with the narrower one first, 0.17 the other way. 128 states of 32×28×28 are pooled to 4×4 cells in 0.57
ms, strip by strip, and were in 1.4; those whose channels are last in memory by torch's own pooling (64
of 64×56×56 in 4.9 ms, and in 33 by a product). Inputs are pooled by torch as well, for their bits tell
the folds, and may not depend on the size of a batch.

Of what was tried, these are not in the package, for they brought nothing (one thread, AVX-512):
symmetric products by SciPy's `dsyrk`; pooling by view and mean on a grid that divides takes 2.3 ms
where one product takes 0.3 (64 images of 64×16×16), which is as fast as a copy; the leading half of the
eigenvectors of a Gram matrix takes twice as long as all of them; QR by Cholesky in the alignment would
save a quarter of it where a network ends 256 wide, by the times of its parts, and nothing elsewhere.
All folds at once take longer or as long where a state is 256 wide, for five matrices do not stay in the
cache (point values of the MLP 1.3 of the time, on another day 0.94; therefore one by one there); ranks
by eigenvalues alone take twice as long as by a Cholesky factor (2.8 ms against 1.3, by the times of its
parts), whose inverse is found no faster by the routine made for it; all states side by side in one copy
make products slower (38 ms against 30 for 4,096 samples of the MLP); sequences are pooled by a product
as fast as now (0.34 ms against 0.36); grids of half as many cells (8 values a kept direction instead of
16) make reports 1 to 4 % shorter and keep more of MiniLM's least state (0.71 instead of 0.57), but
gains and nonlinearities of convolutions repeat 1.3 to 3 times less closely and drift marks 56 of 60
faults instead of 58; a ridge weight put on in place did not move a report beyond noise. Standard errors
of ranks take a fifth of the work over all folds; by their derivative they would be free, and 30 times
too small for units that rarely wake; by the variances that are left along the directions of all samples
they would take a third of the time, and be 6 to 90 times too small where units wake in one fold alone.
Products in float32 would halve the largest part of an MLP's report; they are not used, for reasons
given below.

`Options(errors=False)` gives point values alone: a third less at the end of a report. Measurements of
one network after another may keep their POD bases while these fit (within a hundredth of what they
kept of all samples), which takes nearly all of the first samples' extra cost away.

## Watching a training

`KoopmanCreditMonitor` watches the validation batches that Lightning runs anyway. What an epoch takes in
which it measures, over the epochs between in which it does not (`every_n_epochs=2`, drift included, no
figures, and no effects, which are measured where the budget has room; the MLP and the CNN are the
demo's, on 898 and 2,500 digits; the transformer has 4 blocks of width 128 and reads 28 tokens, the
small one 4 of width 64 and 8 tokens):

<!-- epochs -->
<!-- end -->

Two more processes, beside other work, gave the CNN 1.22 and 1.23.

A measurement has a part that does not depend on the network's own work: some milliseconds per
component, and the POD bases where a state is wider than `max_dim`. The floor holds, for each component,
the calls to BLAS and LAPACK of point values (as above, without alignments of folds and their ranks) and
of drift: an operator for each fold, and what it and the old one miss of that fold and of all samples.
With the products of states, and of the demo with one drawing of its figures; bases, which are kept while
they fit, hooks and rows are not in it. So the target of the MLP's epoch is below its floor, and that of
the demo just above it. Point values choose no ridge weight anew without each fold, which takes
0.7 of their time where weights are not settled, and drift copies no operators, 0.75 of what holding old
against new took. With states of up to 256, the CNN took 1.51, the transformer 1.18 and the small one
2.41 on this machine.

So by default not every epoch is measured: all of watching, with effects, figures and the report at the
end, may take 5 % of the training's time (`max_overhead=0.05`), and 1.5 seconds in any case. The demo
trains for less than two, so the 1.5 are what decides there; it then gets 5 to 28 measurements, by what
else the machine does. With each epoch measured, of 2.7 s that were counted on a busy machine, 1.1 were
thirty reports, 0.7 drift, 0.3 rows and products, and 0.3 figures (2.1 before they were drawn with fewer
texts, fewer pixels and three instead of six at a time):

<!-- demo -->
<!-- end -->

Longer trainings, with the monitor as it is by default, TensorBoard and figures. The two take turns, an
epoch each, in both orders; the CNN beside other work, the transformer with nothing beside it (with tests
on the other core it gave 1.056, of which 0.031 were not counted):

<!-- minutes -->
<!-- end -->

Epochs of the two stand beside each other, so that each pair tells what a watched one takes more than
what the monitor counts as its own (`koopman/overhead`, here by processor seconds of its turns): that is
*not counted*, and the error of both columns is that of these differences. By themselves, epochs of one
and the same training differ by more than all that watching takes: those of the CNN took 1.26 to 1.72
processor seconds within a minute, beside neighbours on the same core. Of two trainings that take turns
and of which neither is watched, the second took 2.6 % more (CNN, 24 epochs), and 6 ± 3 % more
(transformer, 14 epochs); so both orders count, and errors below one percent take long trainings.

Where every second epoch is measured, what measured epochs take more than their neighbours is what is
counted: 0.101 and 0.102 s (MLP), 0.366 and 0.347 s (CNN), 0.389 and 0.383 s (small transformer). Epochs
between, in which nothing is measured, have no page faults more and no collections of garbage more than
without a monitor. What is not counted is what the training must fetch again behind a measurement:
caches, and memory that was handed back to the system, which it is after the 1st, 2nd, 4th, 8th …
measurement alone (15,000 page faults for the CNN, at 1 to 2 µs each).

Two processes that train alike differ by up to 3 % for as long as they live, whatever is watched, by
where their memory lies. So twelve pairs of processes were let take turns, with states of up to 256 (CNN,
60 epochs each): what the monitor does not count was 1.3 ± 0.5 % of an epoch, of which a callback that
does nothing costs about 0.5 (2.5 ms for its 260 calls). Therefore six tenths of `max_overhead` are
planned to be spent; it was eight, then seven, with which the CNN took 1.052 and the transformer 1.027.
Pairs go on to differ: that of the CNN said 1.8 % then, another one, of 110 epochs, 0.4 ± 0.4 % less than
nothing.

## Without AVX-512

The targets were stated on a processor without AVX-512. Held to AVX2 by the libraries' own switches
(`MKL_ENABLE_INSTRUCTIONS`, `ATEN_CPU_CAPABILITY`, `ONEDNN_MAX_CPU_ISA`), the same machine gave (the
first two, the convolutions and ResNet-18 as means of two processes, the others measured before):

| figure | ratio (range) | floor | target |  |
| --- | --- | --- | --- | --- |
| report / forward: MLP, 4,096 samples | 11.9 (11.5 … 12.2) | 6.56 | ≤ 12 | met |
| the same, 50,000 | 6.53 (6.33 … 6.64) | 4.54 | ≤ 5 | **missed** |
| the same, 50,000, of enough samples | 1.16 |  | ≤ 5 | met |
| six convolutions | 1.30 (1.22 … 1.34) | 1.16 | ≤ 1.25 | **missed** |
| ResNet-18 | 1.17 (1.16 … 1.20) | 1.08 | ≤ 1.3 | met |
| ViT-Tiny | 1.08 (1.05 … 1.08) | 1.02 | ≤ 1.15 | met |
| 100 layers of 768 | 3.52 (3.52 … 3.59) | 2.02 | ≤ 6 | met |
| epoch measured / not: MLP | 2.71 (1.64 … 3.62) | 1.63 | ≤ 1.5 | **missed**, below the floor |
| CNN | 1.16 (1.15 … 1.20) | 1.05 | ≤ 1.25 | met |
| transformer | 1.08 (1.03 … 1.11) | 1.01 | ≤ 1.06 | **missed** |

On a processor that has no AVX-512 at all (AMD EPYC, Zen 3), reports took more of a pass, in one process
each: the MLP's 4,096 samples 15.2 (14.8 … 15.9; floor 7.89) and 15.4 to 16.9 in ten more beside other
work, so the target of 12 is **missed** there; all 50,000 samples 8.68 (floor 5.22, above the target),
of enough samples 1.55; the convolutions 1.40 (floor 1.18; eight more gave 1.18 to 1.40, by the page
faults of the process), ResNet-18 1.18 (floor 1.07). Its products of 819 samples of width 128 run at 24
to 28 GFLOP/s in double precision by MKL, and at 70 in single; OpenBLAS, which NumPy and SciPy come
with, reaches 38, and 60 for a state with itself. It is not used, for it has threads of its own, which
torch does not steer and which a training would meet. Since then the first pass follows more of what a
network does: in turns with the version before, beside other work, three processes each gave 16.5 to
17.9 for the MLP's 4,096 samples, and 15.5 to 16.3; two each for ResNet-18 1.16 to 1.21, and 1.18. Since
alignments without each fold are made at once, and the rows that a basis is fitted to are added up with
those that follow, the MLP takes 14.8, 15.0 and 15.8 in turns with 16.0, 16.4 and 16.0 before.

Solvers give operators by columns, and a product of two such ones runs in the slowest way there is: five
of 128 × 128 by 128 × 10 took 1.2 ms, and take 0.16 since they are made by rows; the MLP's credits take
35, 36 and 41 ms for 38, 40 and 55 (the least of 60, three processes each, beside other work). The
directions of a basis in double precision were made in that way, too; from 256 rows of 2,048 they take
26 ms for 46, which three of the five states of a trained transformer need at each measurement.

Of a measurement of the demo, 90 of some 155 ms are linear algebra (floor 41) and at most 20 the first
pass, which each measurement follows anew: what a network does may change with the epoch, and nothing
but following it shows that.

On a third machine (AMD EPYC, Zen 4, which has AVX-512 at half the width), in one process with nothing
beside it: the MLP's 4,096 samples 13.2 (12.8 … 52.3; floor 7.26), so **missed** there, all 50,000 7.93
(4.95), of enough samples 1.17; the convolutions 1.35 (1.20), ResNet-18 1.20 (1.10), ViT-Tiny 1.12
(1.04), 100 layers 4.00 (2.34). An epoch measured over others: MLP 2.91 (1.66), CNN 1.21 (1.06), the
transformer 1.06 (1.01). The demo with every epoch measured took 3.29 times as long as without (floor
1.85), by default 2.32. Another process, with other work on the other core, gave 13.0, 7.48, 1.40, 1.23,
1.13 and 4.22; 2.96, 1.19 and 1.09; 3.09 and 2.23.

Since then each state is copied by columns before products are made of it, for BLAS takes those of rows
that lie side by side faster, both on this machine (819 samples of width 128 with themselves 0.45 ms for
0.52, of 128 by 128 0.60 for 0.69, of 128 by 10 0.09 for 0.11; the copy takes 0.06 ms more). In turns
with the version before, beside other work, three processes each: the MLP's 4,096 samples 13.2 to 13.8
for 13.9 to 14.2, all 50,000 7.14 to 7.30 for 7.60 to 7.70; held to AVX2 13.0 to 13.1 for 13.5 to 14.9,
and 7.25 to 7.79 for 7.77 to 7.99. A hundred layers took as long (3.98 to 4.44 for 4.05 to 4.26). With
nothing beside it, on another day than the first figures, one process gave 14.0 (13.2 … 15.3; floor 6.87)
and 7.52 (6.05 … 8.14; 4.89), so both are **missed** here; the convolutions 1.36 (1.18), ResNet-18 1.23
(1.10), ViT-Tiny 1.05 (1.04), 100 layers 4.05 (2.30).

## Against Captum

`LayerConductance` with 50 steps, for each linear layer, against one report; the same samples at
once, on a core beside other work.

<!-- conductance -->
<!-- end -->

## Operator fit

ReLU snapshots, float64. scikit-learn, kooplearn, gelsd and PyDMD fit once; `fit_operator` with its
defaults also holds out R² over five folds, for which it fits five times more. `folds=None` leaves
that out.

<!-- fits -->
<!-- end -->

Residuals relative to that of gelsd (with a cut-off of 1e-10), at 10,000 samples:

<!-- residuals -->
<!-- end -->

Products of centred float32 blocks of 512 rows, summed in float64, keep eleven digits of the
residual, and the rank where units are dead or doubled exactly. They do not keep small eigenvalues:
rounding of 1e-8 of the largest hides every direction below it, so that states confined to a
subspace seem to fill the space. And sums then depend, in the seventh digit, on how the samples were
divided into batches and processes, where a report promises nine. Therefore all products are
float64, whatever the type of the states.

## Memory

Kept are, for each fold, a count, the sum of every state, and the products of every state with
itself, with the state before it and with the last one, in float64. With widths d_0 … d_L (at most
`max_dim` each), F folds, delay 1 and no skip connections this is

    8 F (1 + Σ d_i + Σ d_i² + Σ d_i d_{i+1} + Σ_{i < L-1} d_i d_L) bytes,

whatever the number of samples; further delays and skip connections add the products of the states
that they bring together. Beside it there are at most 2^22 gathered values (or `2 * max_dim` rows),
the POD bases, and, while a report is made, eigenvectors and operators of all splits: as much again.
Networks of layers of one width with ReLUs, peak on top of a forward pass:

<!-- memory -->
<!-- end -->

What is kept is the same for any number of samples. Peaks are those with glibc's mapping threshold fixed
(`MALLOC_MMAP_THRESHOLD_=131072`): left alone, it moves with what was freed before, and decides which
blocks of half a MiB, of which a report has hundreds, are given back at once. That was why peaks of one
and the same report lay on two levels, 2 to 10 % apart: in an earlier version, seven runs gave 184 to 197
MiB for 12 components of width 256 and 2,000 samples, and three with the threshold fixed 186.5 to 187.8.
Peaks of these tables are of 30 November 2026, the seconds beside them of two and three days before.
Where all operators without each fold have 2^20 entries or fewer (up to 12 components of width 128, at 5
folds), they are aligned at once, in less time and in up to 13 MiB more (10 of 45 with 6 components).

Seconds and memory against one size at a time, the others being 12 components of width 128, 2,000
samples and 5 folds. A slope is the exponent of the power that fits best, by least squares between
logarithms: 1 is linear. Products cost d² per sample and eigendecompositions d³ once, a report has parts
that do not depend on the samples, and each fold takes one more fit.

<!-- slopes -->
<!-- end -->

## A large model, on paper

No such machine was at hand. A transformer with 32 blocks of width 4,096, 2,048 tokens a sample, in
bfloat16 under FSDP2 on 64 devices, 4,096 samples a measurement: bytes follow from the formula above,
seconds are those of the processor of this page for one basis and one component, times their number.

<!-- large -->
<!-- end -->

For a device of 400 TFLOP/s and 3 TB/s, a forward pass takes about 70 ms a sample, 64 of them 4.5 s;
pooling, projections and products add about 0.4 ms a sample, if pooling is bound by memory and products
run in float64 at 20 TFLOP/s: less than one percent. Weights are sharded, states are not: FSDP2 gives
each device whole states of its own samples, so nothing is gathered for them.

What breaks first is the first process. While it fits bases and computes credits on one processor, 63
devices wait, 1.4 s, where their share of the forward pass took 4.5: the overhead of a measurement is
its fixed part. Next come the first rows, which all processes are sent though one needs them: over all of
them 64 times what the table says, once per measurement. Rows wait in each process until the bases are
agreed on, so memory grows with `max_samples`: at a million samples 15,625 in each, about 9 GB. And
pooling keeps, of 2,048 tokens, one mean for each channel, for 4,096 channels are more than `max_dim`:
what differs between tokens is not measured.
"""
