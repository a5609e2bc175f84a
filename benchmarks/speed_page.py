"""The text around the figures of ``benchmarks/speed.py``."""

PAGE = """# Speed

- **A report** takes 1.1 forward passes of a ViT, 1.3 of ResNet-18, 3.7 of 100 layers of 768, and 11.6 of
  a small MLP (0.06 s): [one report](#one-report-against-the-forward-pass).
- **An epoch that is measured** takes 1.07 times one that is not (transformer) to 2.9 times (an MLP whose
  epoch takes 0.02 s): [watching a training](#watching-a-training).
- **A training** of three minutes took 1.7 % (transformer) and 3.7 % (CNN) longer, figures and
  TensorBoard included. By default, watching may take 1.5 seconds in any case, and 5 % of the training
  beyond.
- **Memory** is the same for any number of samples: 0.55 GiB for 100 components of width 768:
  [memory](#memory).
- **Cheaper** it gets with fewer samples, point values, narrower states: [how](#how-to-make-it-cheaper).

Targets that are missed somewhere: a report over a forward pass, an epoch that is measured over one that
is not, the demo over the demo without. A miss is **bold**, after a comma are other processes, in
brackets is the floor, below which no target is within reach. The machines are AMD EPYCs: Zen 5, which
has AVX-512, also held to AVX2; Zen 4, which has it at half the width; and Zen 3, which has none. All
other targets are met in the tables of this page.

| ratio | target | Zen 5 | held to AVX2 | Zen 4 | Zen 3 |
| --- | --- | --- | --- | --- | --- |
| report: MLP | ≤ 12 | 11.6, **12.4** (6.5) | 11.9 (6.6) | **13.6** (7.0) | **14.8 to 15.8** (7.9) |
| the same, 50,000 samples | ≤ 5 | **6.3** (4.5) | **6.5** (4.5) | **7.7** (4.9) | **8.7** (5.2) |
| report: convolutions | ≤ 1.25 | **1.44** (1.25) | **1.30** (1.16) | **1.33** (1.19) | **1.40** (1.18) |
| report: ResNet-18 | ≤ 1.3 | 1.29, **1.31** (1.13) | 1.17 (1.08) | 1.22 (1.10) | 1.16 to 1.21 (1.07) |
| epoch: MLP | ≤ 1.5 | **2.91** (1.71) | **2.71** (1.63) | **2.98** (1.63) | |
| epoch: CNN | ≤ 1.25 | **1.25**, 1.22 and 1.23 (1.08) | 1.16 (1.05) | 1.23 (1.06) | |
| epoch: transformer | ≤ 1.06 | **1.07** (1.01) | **1.08** (1.01) | 1.06 (1.01) | |
| demo, every epoch measured | ≤ 2 | **3.44** (1.95) | | **3.35** (1.82) | |
| demo, default | ≤ 2 | **3.09** (1.76) | | **2.45** (1.52) | |

On an Intel Xeon with AVX-512 and AMX, in one process, reports took **17.2** (6.9), **10.1** (4.4; 1.56
by default), **1.47** (1.25) and 1.30 (1.09), epochs **2.74** (1.36), 1.22 (1.04) and **1.09** (1.01),
the demo **3.11** (1.49) and **2.09** (1.31), in the order of the table. ViT-Tiny misses its 1.15 there:
**1.30** (1.06). A page fault takes 7 to 16 µs on that machine. The pass alone has none, and in reports
on 512 samples it had 20 to 100,000, by what its process gave back before, and took 1.22 to 1.68 passes.

Tables are written by `benchmarks/speed.py` (`python benchmarks/speed.py docs/speed.md`, with the extra
`benchmarks` and `OMP_NUM_THREADS=1`; about 50 minutes of a core), the text around them by hand. Where
nothing else is said, figures are of two virtual cores of an AMD EPYC (Zen 5, AVX-512), no GPU, one
thread, torch <torch>. Seconds are processor seconds of the measuring process, both sides of a ratio were
measured in turn in one run, and the median is taken over neighbours. Other work ran on the other core,
and one and the same pass takes up to 1.6 times as long by what neighbours do: trust the ratios, not the
seconds. Operator fits and their residuals are of an Intel Xeon with AVX-512.

## One report against the forward pass

The same batches run through the network alone, and through `credit_report(..., max_samples=None)`: all
components, all samples, 5 folds, error bars, states of at most 128. The last column is a report as it is
by default, which looks at enough samples (in brackets), over a forward pass of all of them.

<!-- reports -->
<!-- end -->

Nine more processes gave 11.8 to 12.4 for the MLP's 4,096 samples, so the target is met in most and not
in all; its 50,000 samples took 6.46 to 6.57, the convolutions 1.47 to 1.54 and ResNet-18 1.27 to 1.31 in
six. Another process gave a floor of 1.27 for the convolutions, and one of 5.32 for all 50,000 samples.

**The floor** is what the library calls alone take by which a report's numbers are defined, over the
forward pass, each part the least of five runs: 1 for the pass itself; one pooling of each state and its
projection; the products of all states in float64; one eigendecomposition in float32 of the Gram matrix
of the first 256 samples for each state wider than `max_dim`; and what each component takes. That is one
eigendecomposition and one alignment of all samples, and for each of five folds a Cholesky factorisation
and solution, the products of held-out errors (of the step, and of the chain behind it), a product and a
factorisation for the volume, and a factorisation for the rank, all at most 128 wide.

**Above the floor** are, for each sample, copies, hashes that tell the folds and hooks in Python, and for
each component the copies of moments less those of a fold, solutions under a second ridge weight, the
inverse that a rank takes, and small operations.

On the other processors, in one process each, ranges and floors in brackets:

| report / forward | Zen 5, held to AVX2 | Zen 4 | Zen 3 |
| --- | --- | --- | --- |
| MLP, 4,096 samples | 11.9 (11.5 … 12.2; 6.56) | 13.6 (12.3 … 14.1; 7.03) | 14.8, 15.0, 15.8 (7.89) |
| the same, 50,000 | 6.53 (6.33 … 6.64; 4.54) | 7.68 (7.58 … 7.80; 4.87) | 8.68 (5.22) |
| the same, 50,000, of enough samples | 1.16 | 1.19 | 1.55 |
| six convolutions | 1.30 (1.22 … 1.34; 1.16) | 1.33 (1.19) | 1.40 (1.18) |
| ResNet-18 | 1.17 (1.16 … 1.20; 1.08) | 1.22 (1.10) | 1.16 to 1.21 (1.07) |
| ViT-Tiny | 1.08 (1.05 … 1.08; 1.02) | 1.10 (1.04) | |
| 100 layers of 768 | 3.52 (3.52 … 3.59; 2.02) | 4.15 (2.28) | |

The targets were stated on a processor without AVX-512, so Zen 5 was held to AVX2 by the libraries' own
switches (`MKL_ENABLE_INSTRUCTIONS`, `ATEN_CPU_CAPABILITY`, `ONEDNN_MAX_CPU_ISA`); its first two rows,
the convolutions and ResNet-18 are means of two processes. Beside other work, three processes on Zen 4
gave 13.2 to 13.8 for the MLP and 7.14 to 7.30 for all of its samples, and held to AVX2 13.0 to 13.1 and
7.25 to 7.79. On Zen 3, eight more gave 1.18 to 1.40 for the convolutions, by the page faults of the
process; its first row is of three processes and ResNet-18 of two, beside other work; all but the first
row were measured before alignments without each fold were made at once.

**What makes it fast**, for who changes it:

- Symmetric products are made in strips of 32 columns: 819 samples of width 128 take 0.44 ms, by one
  product 0.58; of width 256 1.45 and 2.19. Of widths 128 and 10, they take 0.08 ms with the narrower one
  first, 0.17 the other way.
- States are copied by columns before products are made of them, for BLAS takes those of rows that lie
  side by side faster (Zen 4: 819 samples of width 128 with themselves 0.45 ms for 0.52; the copy takes
  0.06 ms more).
- Operators, which solvers give by columns, are multiplied by rows: five products of 128 × 128 by 128 ×
  10 take 0.16 ms for 1.2, directions of a basis in double precision from 256 rows of 2,048 26 ms for
  46.
- Where covariances are up to 457 wide, all five folds are left out at once: credits of six layers take
  0.70 (width 64), 0.79 (96), 0.86 (128), 0.84 (160) and 0.93 (192) of the time that one fold after the
  other takes, their point values 0.61, 0.74, 0.86, 0.83 and 0.86.
- 128 states of 32×28×28 are pooled to 4×4 cells in 0.57 ms, strip by strip; those whose channels are
  last in memory by torch's own pooling (64 of 64×56×56 in 4.9 ms, by a product in 33). Inputs are pooled
  by torch as well, for their bits tell the folds, and may not depend on the size of a batch.
- Each report frees a block of 32 MiB first, which nobody wrote to. glibc learns from the largest block
  that was freed what to keep; left alone, it hands back behind each layer the memory of states as large
  as those of the convolutions (12.8 MB each), in some processes, and their own pass takes 1.03 to 1.05 s
  for 0.53 to 0.54.
- Cholesky factors are upper ones, as LAPACK has by columns what torch has by rows: factors of five
  folds of width 128 and their solutions take 1.93 ms, by lower ones 2.14 (Zen 4).
- Where many branches lie side by side, as steps of a loop that all read the input, volumes of two are
  compared where a state reads both, not of all pairs: a report on a loop of five small layers over 96
  steps takes 20 s for 125 (its passes 0.11), over 48 steps 9.3 for 23 (Xeon).
- What is done to a state beside the network, as its copy, is kept from what follows the data: an
  operator that is followed takes 0.05 ms more, and of 45 in the first pass of the MLP 11 are its own.
- What drift is measured against is fitted when something is held against the report, not in each.

**What was tried and is not in the package** (one thread, AVX-512):

- symmetric products by SciPy's `dsyrk`: nothing;
- pooling by view and mean on a grid that divides: 2.3 ms where one product takes 0.3 (64 images of
  64×16×16), which is as fast as a copy; sequences by a product: 0.34 ms against 0.36;
- the leading half of the eigenvectors of a Gram matrix: twice as long as all of them;
- QR by Cholesky in the alignment: a quarter of it less where a network ends 256 wide, nothing elsewhere;
- all folds at once where a state is 256 wide: 1.3 of the time for the MLP's point values (on another day
  0.94), for five matrices do not stay in the cache;
- ranks by eigenvalues alone: 2.8 ms against 1.3 by a Cholesky factor; the inverse of its triangle by
  halves: 5.5 ms for 5.8 over the MLP's folds, no less at 256;
- operators by the inverse of a covariance: 0.27 ms for 0.45 from 64 to 128 units, 1.0 for 0.64 back (Zen
  4, five folds);
- a state's products with itself, the next one and the last at once, side by side in one copy: 1.41 ms
  for 1.40, without the copy 1.32 (Zen 4, 128 units each, 10 outputs);
- all states side by side in one copy: products slower (38 ms against 30 for 4,096 samples of the MLP);
- grids of half as many cells (8 values a kept direction instead of 16): reports 1 to 4 % shorter, and
  MiniLM's least state keeps .71 instead of .57, but gains and nonlinearities of convolutions repeat 1.3
  to 3 times less closely, and drift marks 56 of 60 faults instead of 58;
- a ridge weight put on in place: nothing beyond noise;
- standard errors of ranks, a fifth of the work over all folds: by their derivative free, and 30 times
  too small for units that rarely wake; by the variances that are left along the directions of all
  samples a third of the time, and 6 to 90 times too small where units wake in one fold alone;
- products in float32: half of the largest part of an MLP's report, and
  [not exact enough](#operator-fit);
- OpenBLAS, which NumPy and SciPy come with: 38 GFLOP/s for products of 819 samples of width 128 in
  double precision, and 60 for a state with itself, where MKL runs at 24 to 28 (Zen 3; 70 in single). It
  has threads of its own, which torch does not steer and which a training would meet.

## Watching a training

`KoopmanCreditMonitor` watches the validation batches that Lightning runs anyway. What an epoch takes in
which it measures, over the epochs between in which it does not (`every_n_epochs=2`, drift included, no
figures, and no effects, which are measured where the budget has room; the MLP and the CNN are the
demo's, on 898 and 2,500 digits; the transformer has 4 blocks of width 128 and reads 28 tokens, the small
one 4 of width 64 and 8 tokens):

<!-- epochs -->
<!-- end -->

Two more processes, beside other work, gave the CNN 1.22 and 1.23. Held to AVX2, the MLP took 2.71 (1.64
… 3.62; floor 1.63), the CNN 1.16 (1.15 … 1.20; 1.05), the transformer 1.08 (1.03 … 1.11; 1.01). One
process on Zen 4 gave 2.98 (floor 1.63), 1.23 (1.06) and 1.06 (1.01).

A measurement has a part that does not depend on the network's own work: some milliseconds per component,
and the POD bases where a state is wider than `max_dim`. **The floor** holds, for each component, the
calls to BLAS and LAPACK of point values (as above, without alignments of folds and their ranks) and of
drift: an operator for each fold, and what it and the old one miss of that fold and of all samples. With
the products of states, and of the demo with one drawing of its figures; bases, which are kept while they
fit, hooks and rows are not in it. So the target of the MLP's epoch is below its floor, and that of the
demo just above it. Of a measurement of the demo, 90 of some 155 ms are linear algebra (floor 41) and at
most 20 the first pass, which each measurement follows anew (Zen 3): what a network does may change with
the epoch, and nothing but following it shows that.

So by default not every epoch is measured. The demo trains for less than two seconds, so the 1.5 that
watching may take in any case are what decides there; it then gets 5 to 28 measurements, by what else the
machine does:

<!-- demo -->
<!-- end -->

On Zen 4, one process gave 3.35 with every epoch measured (floor 1.82), and 2.45 by default (17
measurements).

Longer trainings, with the monitor as it is by default, TensorBoard and figures. The two take turns, an
epoch each, in both orders; the CNN beside other work, the transformer with nothing beside it (with tests
on the other core it gave 1.056, of which 0.031 were not counted):

<!-- minutes -->
<!-- end -->

*Not counted* is what a watched epoch takes more than the one beside it, less what the monitor counts as
its own (`koopman/overhead`, here by processor seconds of its turns); the error of both columns is that
of these differences. It is what the training must fetch again behind a measurement: caches, and memory
that was handed back to the system, which it is after the 1st, 2nd, 4th, 8th … measurement alone (15,000
page faults for the CNN, at 1 to 2 µs each). Where every second epoch is measured, measured ones take as
much more as is counted: 0.101 and 0.102 s (MLP), 0.366 and 0.347 s (CNN), 0.389 and 0.383 s (small
transformer); those between have no more page faults or collections of garbage than without a monitor.
Six tenths of `max_overhead` are planned to be spent, for not all can be counted.

How far such figures can be trusted: epochs of one and the same training took 1.26 to 1.72 processor
seconds within a minute (CNN), beside neighbours on the same core. Of two trainings that take turns and
of which neither is watched, the second took 2.6 % more (CNN, 24 epochs), and 6 ± 3 % more (transformer,
14 epochs); so both orders count, and errors below one percent take long trainings. Two processes that
train alike differ by up to 3 % for as long as they live, by where their memory lies. Over twelve pairs
of processes, with states of up to 256 (CNN, 60 epochs each), what the monitor does not count was 1.3 ±
0.5 % of an epoch, of which a callback that does nothing costs about 0.5 (2.5 ms for its 260 calls).

## How to make it cheaper

- **Fewer samples.** Reports look at enough of them by default: those of the MLP's 50,000 take 0.99 of a
  pass, not 6.3. `max_samples` sets a bound, `max_samples=None` takes all.
- **Point values alone**, `Options(errors=False)`: a third less at the end of a report. The monitor's
  reports are so until the last.
- **Narrower states**, `max_dim`: with 256, the six networks of the first table took 18.1, 8.57, 2.40,
  2.01, 1.26 and 14.0 passes, and epochs of the CNN 1.51, of the transformer 1.18, of the small one 2.41.
  [What that decides](widths.md).
- **Fewer measurements**, `max_overhead` and `every_n_epochs`, or less in each: of 2.7 s that were
  counted in the demo with each epoch measured, on a busy machine, 1.1 were thirty reports, 0.7 drift
  (`drift=False`), 0.3 rows and products, and 0.3 figures (`figures=False`).
- Measurements of one network after another keep their POD bases while these fit (within a hundredth of
  what they kept of all samples), which takes nearly all of the first samples' extra cost away.

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

Peaks are those with glibc's mapping threshold fixed (`MALLOC_MMAP_THRESHOLD_=131072`): left alone, it
moves with what was freed before, decides which blocks of half a MiB, of which a report has hundreds, are
given back at once, and puts peaks of one and the same report on two levels, 2 to 10 % apart. Peaks of
these tables are of 30 November 2026, the seconds beside them of two and three days before.
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
