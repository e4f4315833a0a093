"""
Train a model: python train.py --dataset shakespeare        (every knob: python train.py --help)

Whatever is drawn at random in a step depends on the seed, the step and the batch's number alone: a run that was
interrupted and continued with --resume ends as one that was not, and any number of processes train alike.
"""
import dataclasses
import functools
import math
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from tasks.text import make_data
from tinybubbles import NEVER_MEASURED, Config
from tools.files import load_checkpoint, make_model, open_log, write_atomically
from tools.pictures import draw_loss
from tools.program import (check_finite, choose_device, in_turn, join_processes, knob, or_refuse, read_flags, refuse,
                           wait_for_all)

FREE = ("max_iters", "eval_interval", "log_interval", "gradient_accumulation_steps", "device", "compile", "out_dir")
LOG_COLUMNS = ("step", "train_loss", "val_loss", "learning_rate", "ms_per_step", "tokens_per_s", "streams_per_token")


@dataclasses.dataclass
class Settings:
    dataset: str = knob("shakespeare", "shakespeare, urns, a text's path, or a folder of .bin files")
    vocab_size: int = knob(None, "tokens of a folder's vocabulary; default: meta.pkl's", "int", low=1)
    out_dir: str = knob("out", "where ckpt.pt, best.pt, log.csv and loss.png go")
    resume: bool = knob(False, "go on from out_dir's ckpt.pt, with its flags; these may differ: " + ", ".join(FREE))
    block_size: int = knob(128, "tokens (bytes) in a context", low=1)
    n_layer: int = knob(4, "blocks", low=1)
    n_head: int = knob(4, "attention heads", low=1)
    n_embd: int = knob(128, "width of a residual stream", low=1)
    fork_layers: tuple = knob((1, 2), "fork before these blocks, counted from 0; none = a plain GPT", "ints")
    budget: tuple = knob((2.0,), "streams per token; several = elastic training, one drawn per step", "floats", low=1)
    paper: bool = knob(False, "the paper's model: originals fade, selection looks at later tokens, so no cache")
    dropout: float = knob(0.0, "share of activations dropped in training", low=0)
    batch_size: int = knob(8, "windows per batch; a step has one batch of each process", low=1)
    gradient_accumulation_steps: int = knob(1, "batches of each process per step, one after the other", low=1)
    max_iters: int = knob(3000, "steps", low=0)
    learning_rate: float = knob(4e-3, "highest learning rate", low=0)
    min_lr: float = knob(2e-4, "lowest learning rate, at the end of the decay", low=0)
    warmup_iters: int = knob(100, "steps of linear warm-up", low=0)
    lr_decay_iters: int = knob(None, "steps until the cosine ends; default: max_iters", "int", low=1)
    weight_decay: float = knob(0.1, "AdamW's, for matrices only", low=0)
    beta1: float = knob(0.9, "AdamW's", low=0)
    beta2: float = knob(0.99, "AdamW's", low=0)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 = no clipping", low=0)
    eval_interval: int = knob(500, "steps between evaluations, each with a sample and a checkpoint", low=1)
    eval_iters: int = knob(40, "batches per evaluation, always the same ones", low=1)
    log_interval: int = knob(20, "steps between progress lines", low=1)
    seed: int = knob(0, "of the weights, the batches and the samples", low=0)
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    dtype: str = knob("auto", "auto: bfloat16 on cuda, else float32", choices=("auto", "float32", "bfloat16"))
    compile: bool = knob(False, "torch.compile training steps: slow to start, faster then")


def measure_bars(model, idx, budgets):
    """Set the bars of `budgets` as the texts idx (B, T) say. What a fork layer is offered depends on the bars of those
    before it, so the texts are read once for each. A bar that was never measured is set all the way by a forward pass
    in which its layer trains, and only that one does. The paper's model has no bars."""
    was_training = model.training
    model.eval()
    for budget in budgets if model.causal else ():
        for fork in model.forks.values():
            fork.bar[fork.budgets == budget] = NEVER_MEASURED
            fork.train()
            with torch.enable_grad():
                model(idx, budget=budget)
            fork.eval()
    model.train(was_training)


def make_optimizer(model, s, device):
    """AdamW over every parameter; only matrices decay."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    groups = [dict(params=matrices, weight_decay=s.weight_decay), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=device.type == "cuda")


def learning_rate(step, s):
    """Linear warm-up, then a cosine from learning_rate to min_lr at lr_decay_iters (default: max_iters)."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    done = (step - s.warmup_iters) / max(1, (s.lr_decay_iters or s.max_iters) - s.warmup_iters)
    return s.min_lr + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (s.learning_rate - s.min_lr)


class Trainer:
    """One run: what the Settings `s` say, built, trained and written to out_dir. saved: the checkpoint to go on from;
    make: makes the model of a Config and --paper. Every process of torchrun has a Trainer; the first one writes."""
    def __init__(self, s, saved=None, make=make_model):
        self.s, self.out, self.stop, self.pending, self.start = s, Path(s.out_dir), False, [], 0
        self.rank, self.world, self.device = join_processes(choose_device(s.device))
        self.half = s.dtype == "bfloat16" or s.dtype == "auto" and self.device.type == "cuda"
        self.say = (lambda text: None) if self.rank else functools.partial(print, flush=True)
        self.data = in_turn(lambda: make_data(s), self.rank, self.world)             # the first one fetches it for all
        shared = {f.name: getattr(s, f.name) for f in dataclasses.fields(Config) if hasattr(s, f.name)}
        shared |= dict(budget=max(s.budget), bar_budgets=Config.bar_budgets + s.budget, vocab_size=self.data.vocab_size)
        torch.manual_seed(s.seed)
        self.model = or_refuse(lambda: make(Config(**shared), s.paper)).to(self.device)
        if s.compile:
            torch._dynamo.config.recompile_limit = 100                # a graph for each budget that is trained
        compiled = torch.compile(self.model) if s.compile else self.model
        self.parallel = DDP(compiled) if self.world > 1 else compiled
        self.optimizer = or_refuse(lambda: make_optimizer(self.model, s, self.device))
        self.batches, self.val_loss, self.best = self.world * s.gradient_accumulation_steps, math.inf, math.inf
        if saved and saved["batches"] != self.batches:
            refuse(f"--resume needs {saved['batches']} batches per step as before, not {self.batches}: "
                   "processes times --gradient_accumulation_steps")
        if saved and saved["vocabulary"] != self.data.vocabulary:
            refuse(f"--resume needs the vocabulary as before; put back the meta.pkl of {s.dataset}")
        if saved:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.start, self.val_loss, self.best = saved["step"], saved["val_loss"], saved["best_val_loss"]
        self.data.val_batch(0), self.data.train_batch(self.random(0))                # may refuse: before files change
        self.log = None if self.rank else open_log(self.out / "log.csv", LOG_COLUMNS, self.start if saved else -1)

    def random(self, step, number=0, purpose=0):
        """A generator: of a step's batch and its dropout (purpose 0), its budget (1), the texts for bars (2)."""
        return np.random.default_rng((self.s.seed, step, number, purpose))

    def loss(self, model, batch, budget, trace=None):
        """The model's loss on a batch: idx and targets (B, T)."""
        idx, targets = (torch.from_numpy(tokens).to(self.device) for tokens in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return model(idx, targets, budget=budget, trace=trace)[1]

    def total(self, values):
        """The sum of a tensor over the processes, which it holds from then on."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def train_step(self, step):
        """One update. What it depends on: the weights, the seed, the step and each batch's number. Returns the loss of
        this process's batches and the last block's owners in the last one."""
        s, n, total, trace = self.s, self.s.gradient_accumulation_steps, 0.0, []
        budget = float(self.random(step, purpose=1).choice(s.budget))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        self.optimizer.zero_grad()
        for number in range(self.rank * n, (self.rank + 1) * n):
            rng = self.random(step, number)
            batch = self.data.train_batch(rng)
            torch.manual_seed(int(rng.integers(2 ** 63)))             # dropout's
            loss = self.loss(self.parallel, batch, budget, trace) / n
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf)
        self.optimizer.step()
        self.val_loss = math.inf                                      # of these weights it is not known
        return total, trace[-1][0]

    @torch.no_grad()
    def evaluate(self, budget):
        """Validation loss in nats per target, always over the same batches, shared out among the processes."""
        n, zero = self.s.eval_iters, torch.zeros((), device=self.device)
        losses = (self.loss(self.model, self.data.val_batch(i), budget) for i in range(self.rank, n, self.world))
        return self.total(sum(losses, zero)).item() / n

    def measure_bars(self, step):
        """Set the bars of the budgets that are not trained, by the same few batches in every process."""
        most = 2.0 ** len(self.model.forks)
        texts = [self.data.train_batch(self.random(step, number, 2))[0] for number in range(4)]
        others = {r for r in self.model.config.bar_budgets if r <= most} - {min(r, most) for r in self.s.budget}
        if self.world > 1:                                            # each process has moved its own since the last step
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        measure_bars(self.model, torch.from_numpy(np.concatenate(texts)).to(self.device), others)

    def checkpoint(self, step):
        """Evaluate; save ckpt.pt, and best.pt if no loss was lower so far; show a sample."""
        self.model.eval()
        self.measure_bars(step)
        losses = {budget: self.evaluate(budget) for budget in self.s.budget}
        self.say(f"step {step:6d}   validation loss   " + "   ".join(f"{losses[r]:.4f} (budget {r:g})" for r in losses))
        self.val_loss = check_finite(losses[self.model.config.budget], step)
        if self.val_loss < self.best:                                 # best.pt first: ckpt.pt says that it is there
            self.best = self.val_loss
            self.save("best.pt", step)
        if not self.rank:
            self.log.writerow(dict(step=step, val_loss=round(self.val_loss, 6)))
            self.save("ckpt.pt", step)
            length = self.s.block_size * (4 if step == self.s.max_iters else 1)
            self.say(self.data.report(self.model, self.model.config.budget, self.device, length))
        self.model.train()

    def save(self, name, step):
        """Write a checkpoint: the weights after `step` updates, and all that --resume needs."""
        if not self.rank:
            state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), batches=self.batches,
                         config=dataclasses.asdict(self.model.config), settings=dataclasses.asdict(self.s),
                         step=step, vocabulary=self.data.vocabulary, val_loss=self.val_loss, best_val_loss=self.best)
            write_atomically(self.out / name, lambda file: torch.save(state, file))
            if self.best == math.inf:                                 # never evaluated: a best.pt is an older run's
                (self.out / "best.pt").unlink(missing_ok=True)

    def check_pending(self, step):
        """Refuse to go on if a loss since the last check is NaN or infinite. Returns them; waits for the device."""
        losses = (self.total(torch.stack(self.pending)) / self.world).tolist() if self.pending else []
        self.pending.clear()
        return [check_finite(loss, at) for at, loss in enumerate(losses, step - len(losses))]

    def progress(self, step, loss, owner, seconds):
        """Print and log how training stands after `step` updates, the last of which took `seconds` each."""
        size, left = self.s.batch_size * self.data.T, round(seconds * (self.s.max_iters - step))
        row = dict(step=step, train_loss=round(loss, 6), learning_rate=learning_rate(step - 1, self.s),
                   ms_per_step=round(seconds * 1000, 1), tokens_per_s=round(size * self.batches / seconds),
                   streams_per_token=round((owner >= 0).sum().item() / size, 3))
        self.say(f"step {step:6d}   loss {loss:7.4f}   {seconds * 1000:8.1f} ms   {row['tokens_per_s']:9,} tokens/s   "
                 f"{row['streams_per_token']:5.3f} streams/token   ETA {left // 60:3d}:{left % 60:02d}")
        if not self.rank:
            self.log.writerow(row)

    def stop_soon(self, number, frame):
        """SIGINT or SIGTERM came: stop after this step; a second one stops at once."""
        self.stop = True
        signal.signal(number, signal.SIG_DFL)

    def stopping(self, step):
        """Whether a signal asks to stop; several processes agree on it where they log."""
        if self.world == 1 or step % self.s.log_interval:
            return self.stop and self.world == 1
        return self.total(torch.tensor(float(self.stop), device=self.device)).item() > 0

    def fit(self):
        """Train for max_iters steps; the run always ends with an evaluation, a checkpoint and a sample."""
        s, train_loss, started = self.s, math.nan, time.perf_counter()
        n_params = sum(p.numel() for p in self.model.parameters())
        self.say(f"{n_params:,} parameters on {self.device} in {'bfloat16' if self.half else 'float32'}, "
                 f"{torch.get_num_threads()} threads; {self.data.size}; steps {self.start} to {s.max_iters}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop_soon)
        clock, clocked = time.perf_counter(), self.start
        for step in range(self.start, s.max_iters + 1):
            if self.val_loss == math.inf and (step == s.max_iters or step > 0 and step % s.eval_interval == 0):
                self.check_pending(step)
                self.checkpoint(step)
                clock, clocked = time.perf_counter(), step
            if step == s.max_iters:
                break
            if self.stopping(step):
                self.check_pending(step)
                self.save("ckpt.pt", step)
                return self.say(f"stopped after {step} steps; to go on: python train.py --resume --out_dir "
                                + shlex.quote(s.out_dir))
            loss, owner = self.train_step(step)
            self.pending.append(loss)
            if (step + 1) % s.log_interval == 0:
                train_loss = self.check_pending(step + 1)[-1]
                self.progress(step + 1, train_loss, owner, (time.perf_counter() - clock) / (step + 1 - clocked))
                clock, clocked = time.perf_counter(), step + 1
        if not self.rank:
            draw_loss(self.out / "log.csv", self.out / "loss.png")
        self.say(f"steps:      {s.max_iters}\nparameters: {n_params:,}\ntrain_loss: {train_loss:.4f}\n"
                 f"val_loss:   {self.val_loss:.4f}\nminutes:    {(time.perf_counter() - started) / 60:.1f}\n"
                 f"checkpoint: {self.out / 'ckpt.pt'}; the best: {self.out / 'best.pt'}, {self.best:.4f}")


def resume(s, argv):
    """The settings and the checkpoint of the run that `s`, with --resume, goes on with; contradictions are refused."""
    path = Path(s.out_dir) / "ckpt.pt"
    saved, _ = load_checkpoint(path, "cpu", Settings)
    s = read_flags(Settings, argv, "", saved["settings"] | dict(out_dir=s.out_dir))
    for name, before in saved["settings"].items():
        if name not in FREE and name != "resume" and getattr(s, name) != before:
            refuse(f"--{name} {getattr(s, name)} contradicts {path}, trained with {before}; leave it out")
    if s.max_iters < saved["step"]:
        refuse(f"--max_iters {s.max_iters} is less than the {saved['step']} steps that {path} has; raise it")
    return s, saved


def main(argv):
    s = read_flags(Settings, argv, __doc__.strip().splitlines()[0])
    s, saved = resume(s, argv) if s.resume else (s, None)
    sys.stdout.reconfigure(errors="replace")                          # a sample may hold what it cannot show
    try:
        Trainer(s, saved).fit()
        wait_for_all()                                                # gloo may abort one that leaves first
    except OSError as error:                                          # a full disk, say, while log.csv is written
        refuse(f"{error.filename or s.out_dir} cannot be used ({error.strerror}); ckpt.pt is kept; then --resume")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit("stopped before the first step; nothing is lost") from None
