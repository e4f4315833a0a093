"""What a run prints and logs as it goes, and at its end."""
from tools.pictures import draw_loss
from tools.program import say

LOG_COLUMNS = ("step", "train_loss", "val_loss", "learning_rate", "ms_per_step", "tokens_per_s", "streams_per_token")


def tell_progress(trainer, folder, tell, loss, owner, seconds):
    """Print and log how training stands; the last steps took `seconds` each."""
    s, tokens = trainer.s, trainer.s.batch_size * trainer.data.T      # tokens of one process's batch
    tokens_per_s = round(tokens * trainer.batches / seconds)
    streams = (owner >= 0).sum().item() / tokens                      # -1 is padding
    left = round(seconds * (s.max_iters - trainer.step))
    if folder:
        folder.write_row(dict(step=trainer.step, train_loss=round(loss, 6), ms_per_step=round(seconds * 1000, 1),
                              learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
                              tokens_per_s=tokens_per_s, streams_per_token=round(streams, 3)))
    tell(f"step {trainer.step:6d}   loss {loss:7.4f}   {seconds * 1000:8.1f} ms   {tokens_per_s:9,} tokens/s   "
         f"{streams:5.3f} streams/token   ETA {left // 60:3d}:{left % 60:02d}")


def summarize(trainer, folder, n_params, train_loss, minutes):
    """Draw loss.png, and say what the run has come to."""
    draw_loss(folder.log, folder.path / "loss.png")
    best = folder.path / "best.pt"
    shown = [("steps", trainer.step), ("parameters", f"{n_params:,}"),
             ("train_loss", "no step was taken" if train_loss is None else f"{train_loss:.4f}"),
             ("val_loss", f"{trainer.val_loss:.4f}"), ("minutes", f"{minutes:.1f}"), ("checkpoint", folder.ckpt)]
    if best.exists():
        shown.append(("best", f"{best}, validation loss {trainer.best_val_loss:.4f}"))
    say("\n".join(f"{name + ':':12}{value}" for name, value in shown))
