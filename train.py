"""
Train a model: python train.py --dataset shakespeare        (every flag: python train.py --help)

A run can be stopped at any time and continued with --resume, and ends as if it had never been stopped: what a step
draws at random depends on the seed, the number of the step and the number of the batch alone. Any number of processes
can share the batches of a step.
"""
import dataclasses
import math
import shlex
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from tasks.text import make_data
from tinybubbles import NEVER_MEASURED, Config
from tools.files import RunFolder, load_checkpoint, make_model, remedy
from tools.program import (Stop, as_typed, check_finite, choose_device, in_turn, join_processes, knob, or_refuse,
                           read_flags, refuse, refuse_if_too_large, run_program, say, wait_for_all)
from tools.report import LOG_COLUMNS, summarize, tell_progress

FREE = ("dataset", "out_dir", "max_iters", "eval_interval", "log_interval", "gradient_accumulation_steps", "device",
        "compile")  # what may differ when a run is resumed


@dataclasses.dataclass
class Settings:
    dataset: str = knob("shakespeare", "shakespeare; urns, a task of experiments/README.md; a text's path; or a folder of "
                        ".bin files")
    vocab_size: int = knob(None, "tokens of a folder's vocabulary; above 65,536 its .bin files are read as uint32, else "
                           "as uint16; default: meta.pkl's", "int", low=1)
    out_dir: str = knob("out", "where ckpt.pt, best.pt, log.csv and loss.png go")
    resume: bool = knob(False, "go on from out_dir's ckpt.pt, with its flags; these may differ: " + ", ".join(FREE))
    start_over: bool = knob(False, "replace the run in out_dir, once the new one has its first checkpoint")
    block_size: int = knob(128, "tokens (bytes) in a context", low=1)
    n_layer: int = knob(4, "blocks", low=1)
    n_head: int = knob(4, "attention heads", low=1)
    n_embd: int = knob(128, "width of a residual stream", low=1)
    fork_layers: tuple = knob((1, 2), "fork before these blocks, counted from 0; none = a plain GPT", "ints")
    budget: tuple = knob((2.0,), "streams per token; several = elastic training, one drawn per step", "floats", low=1)
    paper: bool = knob(False, "the paper's model: originals fade, selection looks at later tokens, so no cache")
    dropout: float = knob(0.0, "share of activations dropped in training", low=0, below=1)
    batch_size: int = knob(8, "windows per batch", low=1)
    gradient_accumulation_steps: int = knob(1, "batches of each process in a step, one after the other", low=1)
    max_iters: int = knob(3000, "steps", low=0)
    optimizer: str = knob("muon", "muon: Muon for the matrices of the blocks, AdamW for the rest; adamw: AdamW for all",
                          choices=("muon", "adamw"))
    learning_rate: float = knob(8e-3, "highest learning rate, of both optimizers; for AdamW alone 4e-3 is better", low=0)
    min_lr_share: float = knob(0.01, "the lowest learning rate, as a share of the highest", low=0)
    warmup_iters: int = knob(100, "steps of linear warm-up", low=0)
    lr_decay_iters: int = knob(None, "steps until the decay ends, after which the rate stays as it is; default: max_iters "
                               "as first given, so a run whose max_iters is raised later goes on at the lowest rate",
                               "int", low=1)
    weight_decay: float = knob(0.1, "weight decay, of matrices only", low=0)
    beta1: float = knob(0.9, "AdamW's beta1", low=0, below=1)
    beta2: float = knob(0.99, "AdamW's beta2", low=0, below=1)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 = no clipping", low=0)
    eval_interval: int = knob(500, "steps between evaluations, each with a sample and a checkpoint", low=1)
    eval_iters: int = knob(40, "batches per evaluation, always the same ones", low=1)
    log_interval: int = knob(20, "steps between progress lines", low=1)
    seed: int = knob(0, "seed of the weights, the batches and the samples", low=0)
    device: str = knob("auto", "auto (cuda, else mps, else cpu), or a device")
    dtype: str = knob("auto", "auto: bfloat16 on cuda, else float32", choices=("auto", "float32", "bfloat16"))
    compile: bool = knob(False, "torch.compile training steps: slow to start, faster then")

    def __post_init__(self):
        if self.lr_decay_iters is None:
            self.lr_decay_iters = max(1, self.max_iters)


def make_optimizers(model, s, device):
    """A list of optimizers that have every parameter once. Only matrices decay."""
    in_blocks = {id(p) for p in model.blocks.parameters()} if s.optimizer == "muon" else set()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    for_muon = [p for p in matrices if id(p) in in_blocks]
    groups = [dict(params=[p for p in matrices if id(p) not in in_blocks], weight_decay=s.weight_decay),
              dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=device.type == "cuda")
    if not for_muon:
        return [adamw]
    # match_rms_adamw: an update of Muon is as large as one of AdamW at the same rate, whatever the matrix's shape.
    return [adamw, torch.optim.Muon(for_muon, lr=s.learning_rate, weight_decay=s.weight_decay, momentum=0.9,
                                    adjust_lr_fn="match_rms_adamw")]


def get_lr(step, s):
    """Of both optimizers: a linear warm-up, then a straight line down to min_lr_share of the highest rate."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    done = min(1.0, (step - s.warmup_iters) / max(1, s.lr_decay_iters - s.warmup_iters))
    return s.learning_rate * (1 - (1 - s.min_lr_share) * done)


def measure_bars(model, idx, budgets):
    """Set the bars of `budgets` as the texts idx (B, T) say. A fork layer's bar depends on what the fork layers before it
    have chosen, so the layers are measured in their order, each by a pass of its own: its bar is forgotten, and a
    forward pass sets it anew, as the layer is in train mode, it alone, and gradients are on. The paper's model has no
    bars."""
    was_training = model.training
    model.eval()
    # No backward pass follows, so nothing is kept for one: at a high budget it would not fit beside a model that does.
    keep_nothing = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
    for budget in budgets if model.causal else ():
        for fork in model.forks.values():
            fork.bar[fork.budgets == budget] = NEVER_MEASURED
            fork.train()
            with torch.enable_grad(), keep_nothing:
                model(idx, budget=budget)
            fork.eval()
    model.train(was_training)


class Trainer:
    """What is trained, and on what: data, model and optimizers, as the Settings `s` say. saved: a checkpoint to go on
    from; make: makes the model of a Config and --paper. Every process of torchrun has a Trainer."""

    def __init__(self, s, saved=None, make=make_model):
        self.s = s
        self.rank, self.world, self.device = join_processes(choose_device(s.device))
        self.bfloat16 = s.dtype == "bfloat16" or s.dtype == "auto" and self.device.type == "cuda"
        self.batches = self.world * s.gradient_accumulation_steps                    # per step
        self.data = in_turn(lambda: make_data(s), self.rank, self.world)             # the first one fetches it for all
        shared = {f.name: getattr(s, f.name) for f in dataclasses.fields(Config) if hasattr(s, f.name)}
        # Of several budgets the largest is the model's own: the loss at it decides which checkpoint is the best.
        shared |= dict(budget=max(s.budget), bar_budgets=Config.bar_budgets + s.budget, vocab_size=self.data.vocab_size)
        torch.manual_seed(s.seed)
        self.model = or_refuse(lambda: make(Config(**shared), s.paper)).to(self.device)
        self.optimizers = or_refuse(lambda: make_optimizers(self.model, s, self.device))
        if s.compile:
            torch._dynamo.config.recompile_limit = 100                # a graph for each budget that is trained
        compiled = torch.compile(self.model) if s.compile else self.model
        self.parallel = DDP(compiled) if self.world > 1 else compiled
        self.step, self.val_loss, self.best_val_loss = 0, None, None  # steps taken; losses that are known
        if saved:
            self.take_over(saved)
        elif self.rank == 0:
            self.data.scan()

    def take_over(self, saved):
        """Go on where a checkpoint was saved, or refuse if that cannot give the same run."""
        if saved["batches"] != self.batches:
            refuse(f"--resume needs as many batches per step as before, {saved['batches']}, not {self.batches}; set the "
                   "processes times --gradient_accumulation_steps to that")
        if saved["fingerprint"] != self.data.fingerprint():
            refuse(f"--resume needs the data as before, and {self.s.dataset} holds other data; put the old one back, or "
                   "name where it is with --dataset")
        if saved["vocabulary"] != self.data.vocabulary:
            refuse(f"--resume needs the vocabulary as before; put back the meta.pkl of {self.s.dataset}")
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.val_loss, self.best_val_loss = saved["step"], saved["val_loss"], saved["best_val_loss"]

    def checkpoint(self):
        """All that --resume and sample.py need."""
        return dict(model=self.model.state_dict(), optimizers=[o.state_dict() for o in self.optimizers], step=self.step,
                    config=dataclasses.asdict(self.model.config), settings=dataclasses.asdict(self.s),
                    vocabulary=self.data.vocabulary, fingerprint=self.data.fingerprint(), batches=self.batches,
                    val_loss=self.val_loss, best_val_loss=self.best_val_loss)

    def random(self, number=0, purpose=0):
        """Random numbers of this step: a batch and its dropout (purpose 0), the budget (1), the texts for bars (2)."""
        return np.random.default_rng((self.s.seed, self.step, number, purpose))

    def loss(self, model, batch, budget, trace=None):
        """The model's loss on a batch: idx and targets (B, T)."""
        idx, targets = (torch.from_numpy(tokens).to(self.device) for tokens in batch)
        with self.autocast():
            return model(idx, targets, budget=budget, trace=trace)[1]

    def autocast(self):
        """A context in which --dtype holds."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def total(self, value):
        """The sum of a tensor over the processes, in its place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def train_step(self):
        """One update of the weights. Returns the loss of this process's batches, a tensor, and the owners of the last
        block's streams in its last batch."""
        s, n, loss, trace = self.s, self.s.gradient_accumulation_steps, 0.0, []
        budget = float(self.random(purpose=1).choice(s.budget))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for number in range(self.rank * n, (self.rank + 1) * n):
            rng = self.random(number)
            batch = self.data.train_batch(rng)
            torch.manual_seed(int(rng.integers(2**63)))               # the seed of dropout
            part = self.loss(self.parallel, batch, budget, trace) / n
            part.backward()                                           # DDP averages the gradients of each batch
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = get_lr(self.step, s)
            optimizer.step()
        self.step, self.val_loss = self.step + 1, None
        return loss, trace[-1][0]

    @torch.no_grad()
    def evaluate(self, budget, stop=None):
        """Validation loss in nats per target, always of the same batches, shared out among the processes; None if
        `stop` is asked for meanwhile."""
        n, loss = self.s.eval_iters, torch.zeros((), device=self.device)
        was_training = self.model.training
        self.model.eval()
        for i in range(self.rank, n, self.world):
            if stop is not None and stop.asked:
                break
            # Not the compiled model, of which each budget would need a graph.
            loss += self.loss(self.model, self.data.val_batch(i), budget)
        self.model.train(was_training)
        loss = self.total(loss).item() / n
        return None if stop is not None and stop.agreed() else loss

    def measure_other_bars(self):
        """Set the bars of the budgets that are not trained, by the same 32 texts in every process, or fewer long ones:
        at a high budget a text takes more memory than in training."""
        # The first process's bars are everybody's, as in DDP; but since the last step each has moved its own.
        if self.world > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        most = 2.0 ** len(self.model.forks)                           # n fork layers make at most 2**n streams of one
        trained = {min(budget, most) for budget in self.s.budget}
        others = {budget for budget in self.model.config.bar_budgets if budget <= most} - trained
        n = max(1, min(32, 4096 // self.data.T))
        batches = range(math.ceil(n / self.s.batch_size))
        texts = np.concatenate([self.data.train_batch(self.random(number, purpose=2))[0] for number in batches])[:n]
        with self.autocast():
            measure_bars(self.model, torch.from_numpy(texts).to(self.device), others)


def train(trainer, folder, stop):
    """Train until max_iters, evaluating on the way and at the end, or until `stop` is asked for. folder: None in all
    processes but the first."""
    s, n_params = trainer.s, sum(p.numel() for p in trainer.model.parameters())
    tell = say if trainer.rank == 0 else lambda text: None
    tell(f"{n_params:,} parameters on {trainer.device} in {'bfloat16' if trainer.bfloat16 else 'float32'}, "
         f"{torch.get_num_threads()} threads; {trainer.data.size}; steps {trainer.step} to {s.max_iters}")
    losses, train_loss, began, clock = [], None, time.perf_counter(), time.perf_counter()
    while True:  # what follows a step comes first: a resumed run may have to evaluate before its next step
        # Evaluate, and save, at every eval_interval and at the end.
        is_last = trainer.step == s.max_iters
        if trainer.val_loss is None and (is_last or trainer.step > 0 and trainer.step % s.eval_interval == 0):
            train_loss = check_losses(trainer, losses) or train_loss
            evaluate_and_save(trainer, folder, stop, tell, is_last)
            clock = time.perf_counter()

        # Stop at the end, or if somebody asks for it: then what has just been evaluated is saved already.
        is_evaluated = trainer.val_loss is not None
        if is_last and is_evaluated:
            break
        if stop.agreed():
            check_losses(trainer, losses)
            if folder and not is_evaluated:
                folder.save(trainer.checkpoint(), is_best=False)
            return tell(f"stopped after {trainer.step} steps; to go on: python train.py --resume --out_dir "
                        + shlex.quote(s.out_dir))

        # Train one step, and say how it goes. The loss is looked at now and then only, as that waits for a GPU.
        loss, owner = trainer.train_step()
        losses.append(loss)
        if trainer.step % s.log_interval == 0:
            steps = len(losses)
            train_loss = check_losses(trainer, losses)
            seconds = (time.perf_counter() - clock) / steps           # per step
            tell_progress(trainer, folder, tell, train_loss, owner, seconds)
            clock = time.perf_counter()
    if folder:
        summarize(trainer, folder, n_params, train_loss, (time.perf_counter() - began) / 60)


def check_losses(trainer, losses):
    """Look at the losses of the last steps, of all processes; end the program at one that is NaN or infinite. Empties
    the list. Returns the last loss, or None if there is none."""
    means = (trainer.total(torch.stack(losses)) / trainer.world).tolist() if losses else []
    first = trainer.step - len(losses)
    losses.clear()
    for step, loss in enumerate(means, first):
        check_finite(loss, step, trainer.s.out_dir)
    return means[-1] if means else None


def evaluate_and_save(trainer, folder, stop, tell, is_last):
    """Find the validation loss at each budget. Save ckpt.pt, and best.pt too if the loss at the largest budget is the
    lowest so far, and show a sample. If it is stopped meanwhile, the loss stays unknown, and a resumed run finds it."""
    s, losses = trainer.s, {}
    trainer.measure_other_bars()
    for budget in s.budget:
        losses[budget] = trainer.evaluate(budget, stop)
        if losses[budget] is None:
            return
    trainer.val_loss = check_finite(losses[trainer.model.config.budget], trainer.step, s.out_dir)
    is_best = trainer.best_val_loss is None or trainer.val_loss < trainer.best_val_loss
    if is_best:
        trainer.best_val_loss = trainer.val_loss
    if folder:
        folder.write_row(dict(step=trainer.step, val_loss=round(trainer.val_loss, 6)))
        folder.save(trainer.checkpoint(), is_best)
    shown = "   ".join(f"{loss:.4f} (budget {budget:g})" for budget, loss in losses.items())
    tell(f"step {trainer.step:6d}   validation loss   {shown}")
    if folder and not stop.asked:
        trainer.model.eval()
        tell(trainer.data.report(trainer.model, trainer.model.config.budget, trainer.device,
                                 s.block_size * (4 if is_last else 1)))
        trainer.model.train()


def resume(s, argv):
    """The settings and the checkpoint of the run that `s`, with --resume, goes on with; contradictions are refused."""
    path = Path(s.out_dir) / "ckpt.pt"
    saved, _ = load_checkpoint(path, "cpu", Settings)
    s = read_flags(Settings, argv, "", saved["settings"] | dict(out_dir=s.out_dir, start_over=False))
    for name, before in saved["settings"].items():
        if name not in (*FREE, "resume", "start_over") and getattr(s, name) != before:
            refuse(f"--{name} {as_typed(getattr(s, name))} contradicts {path}, trained with {as_typed(before)}; leave it out")
    if s.start_over:
        refuse("--start_over contradicts --resume; leave out one of them")
    if s.max_iters < saved["step"]:
        refuse(f"--max_iters {s.max_iters} is less than the {saved['step']} steps that {path} has; raise it")
    return s, saved


def main(argv):
    s, saved, folder = read_flags(Settings, argv, (__doc__ or "").strip().split("\n")[0]), None, None
    if s.resume:
        s, saved = resume(s, argv)
    try:
        trainer = Trainer(s, saved)
        if trainer.rank == 0:
            folder = RunFolder(Path(s.out_dir), LOG_COLUMNS, saved and saved["step"], s.start_over)
            if s.resume and s.max_iters > s.lr_decay_iters:
                say(f"from step {s.lr_decay_iters} on, where its decay ends, the learning rate stays at "
                    f"{s.learning_rate * s.min_lr_share:g}")
        with Stop() as stop:
            train(trainer, folder, stop)
            wait_for_all()                                            # gloo may abort one that leaves first
    except OSError as error:                                          # a full disk, say, while log.csv is written
        then = "go on with --resume" if folder and folder.ckpt.exists() else "start again"
        refuse(f"{error.filename or s.out_dir} cannot be used ({error.strerror or error}); what was saved is kept; "
               f"{remedy(error, s.out_dir)}, then {then}")
    except (MemoryError, RuntimeError, ValueError) as error:
        refuse_if_too_large(error, "a lower --batch_size (with more --gradient_accumulation_steps), or a smaller "
                            "--block_size, --n_embd or --vocab_size")
        raise
    finally:
        if folder:
            folder.close()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main, "stopped; what was saved is kept")
