"""The panels of the help pages: their names, their order, and the order inside of them."""

from __future__ import annotations

DATA = "Data"
PLAN = "Planned to a budget"
SIZE = "How far to truncate"
WHICH = "Which matrices"
STOP = "When to stop"
BOND = "Which bond, how far"
PRUNED = "What to prune"
ROUNDED = "What to round, and how"
LOOK = "wanda, sparsegpt: what to look at"
RISE = "How sparsity rises in training"
PST = "PST: what is learnt"
HOW = "How to train"
TEACHER = "Distillation"
OVER = "Over-parameterisation (OPF): train more, deploy the same"
EXPERTS = "Of a mixture of experts: other than its checkpoint says"
NETWORKS = "What becomes experts"
ROUTER = "How tokens are routed"
SHARED = "What training adds; finetune obeys"
GATES = "Gates for CI (exit 5)"
HARNESS = "EleutherAI's harness"
DANGER = "Dangerous options"

# These come last, in this order; the others as the fields of a configuration do.
_LAST_PANELS = (LOOK, RISE, PST, HOW, TEACHER, OVER, EXPERTS, DANGER)
# And these in their panels, by the options' keys: fields have the order in which the manifest records them. What is
# not listed comes before what is, as declared: an option that is to follow one of these has to be listed too.
_LAST: dict[str | None, tuple[str, ...]] = {
    None: (
        *("dtype", "precision", "device", "path", "select", "seed", "seeds", "log_steps", "save_steps", "report_to"),
        *("max_shard_size", "dry_run", "resume", "overwrite", "json", "revision"),
    ),
    DATA: ("tokenizer", "eval_batch_size", "batch_size", "max_new_tokens"),
    PLAN: (
        *("calibrate", "samples", "seq_len", "weights", "allocation", "sweeps", "sequential", "compare"),
        "sensitivity",
    ),
    WHICH: ("shape",),
    STOP: ("reference", "patience"),
    BOND: ("tie", "layers", "ignore", "direct"),
    PRUNED: ("scope", "layers", "target", "ignore"),
    PST: ("mask_rank", "mask_alpha1", "mask_alpha2", "detach_magnitude", "faithful"),
    HOW: (
        *("update", "lr", "mpo_lr", "score_lr", "epochs", "steps", "batch_size", "accumulation", "warmup"),
        *("weight_decay", "clip", "random_batches", "gradient_checkpointing", "recompute_weights"),
    ),
    OVER: ("top_n", "splits", "every", "sites", "shape", "score_from", "score_steps", "score_batches"),
    NETWORKS: ("baseline_moe", "layers", "target", "ignore", "sites", "trunc", "shape", "noise"),
    ROUTER: ("jitter",),
    SHARED: ("balance_loss", "z_loss"),
}


def panel_place(panel: str | None) -> int:
    """Where a panel stands: by this number first, then as its first option is declared."""
    return _LAST_PANELS.index(panel) + 1 if panel in _LAST_PANELS else 0


def place(key: str, panel: str | None) -> int:
    """Where an option stands in its panel: by this number first, 0 where it is not listed, then as declared."""
    last = _LAST.get(panel, ())
    return last.index(key) + 1 if key in last else 0
