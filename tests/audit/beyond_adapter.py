"""A plain PyTorch loop that saves, starts again and evaluates, with each mistake that people make there as a case.

The option ``wrong`` names the mistake; without it everything is right. The audit must name each, and nothing else.
"""

import copy
from pathlib import Path

STACK = "beyond"
PACKAGES = ("transformers", "torch")
AXES = frozenset({"resume", "saved", "evaluation"})

RESUMED = {
    "micro_batch": 2, "accumulation": 2, "examples": 12, "epochs": 2, "steps": 5, "optimizer": "adamw", "lr": 0.01,
    "eps": 1e-2, "betas": (0.9, 0.95), "schedule": "linear", "beyond": "resume", "save_after": 2,
}  # fmt: skip
SAVED = {"micro_batch": 2, "accumulation": 2, "steps": 2, "lr": 0.1, "beyond": "saved"}
EVALUATED = {"micro_batch": 2, "accumulation": 4, "examples": 7, "lr": 0.1, "beyond": "evaluation"}
FOUND = {
    "resume": {
        "optimizer": "resume-optimizer", "first moments": "resume-optimizer", "second moments": "resume-optimizer",
        "moments": "resume-optimizer", "count": "resume-optimizer", "schedule": "resume-schedule",
        "data again": "resume-data", "data skipped": "resume-data", "next epoch's order": "resume-data",
        "weights stale": "resume-weights", "weights rounded": "resume-weights", "other gradient": "resume-differs",
    },
    "saved": {
        "stale": "saved-stale", "stale shard": "saved-stale", "stale head": "saved-stale", "average": "saved-average",
        "rounded": "saved-rounded", "head missing": "saved-missing", "one shard": "saved-missing",
        "noise": "saved-differs",
    },
    "evaluation": {
        "rows dropped": "evaluation-rows", "row twice": "evaluation-rows", "template": "evaluation-rows",
        "left unmasked": "evaluation-rows", "training mode": "evaluation-dropout", "batches": "evaluation-mean",
        "batches by rows": "evaluation-mean", "padding": "evaluation-mean", "no name": "evaluation-mean",
    },
}  # fmt: skip
"""The finding of every mistake, by what the case looks at."""
FIELDS = {"resume": RESUMED, "saved": SAVED, "evaluation": EVALUATED}
CASES = (
    *({"name": f"{k} wrong: {w}", "options": {"wrong": w}, **FIELDS[k]} for k, found in FOUND.items() for w in found),
    {"name": "evaluation right: left with mask", "options": {"wrong": "left"}, **EVALUATED},
    {"name": "resume right: in the second epoch", **RESUMED, "save_after": 4},
    {"name": "resume right: own position", "options": {"position": "own"}, **RESUMED},
)


def prepare():
    import transformers  # noqa: F401


def run(case, session):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(session.model).train()
    act = {"resume": resume, "saved": saved, "evaluation": evaluation}[case["beyond"]]
    act(case, session, model, case["options"].get("wrong", ""))


def parts(case, model):
    import torch

    if case["optimizer"] == "adamw":
        betas = tuple(case["betas"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=case["lr"], betas=betas, eps=case["eps"], weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=case["lr"])
    last = case["epochs"] * case["examples"] // (case["micro_batch"] * case["accumulation"])
    linear = case["schedule"] == "linear"
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / last if linear else 1.0)


def windows(case, rows, first_seed=0):
    """The rows of every optimizer step, shuffled anew in every epoch."""
    import torch

    size, found = case["micro_batch"] * case["accumulation"], []
    for epoch in range(case["epochs"]):
        seed = torch.Generator().manual_seed(epoch and epoch + first_seed)
        order = torch.randperm(len(rows), generator=seed).tolist()
        found += [[rows[i] for i in order[at : at + size]] for at in range(0, len(rows), size)]
    return found


def train(case, session, model, optimizer, schedule, left=None, after=lambda step: None):
    left = windows(case, session.rows()) if left is None else left
    for step, window in enumerate(left, start=1):
        optimizer.zero_grad()
        for at in range(0, len(window), case["micro_batch"]):
            loss_sum(model, *padded(window[at : at + case["micro_batch"]])).div(trained(window)).backward()
        optimizer.step()
        schedule.step()
        after(step)
        if session.stepped(model):
            return


def trained(rows):
    return sum(label != -100 for row in rows for label in row["labels"])


def padded(rows, left=False):
    """Tokens, mask and labels of rows of unequal length, each of shape (rows, longest)."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(lists, filling):
        fill = [[filling] * (longest - len(items)) for items in lists]
        return torch.tensor([[*f, *items] if left else [*items, *f] for f, items in zip(fill, lists, strict=True)])

    ids = [row["input_ids"] for row in rows]
    return filled(ids, 0), filled([[1] * len(i) for i in ids], 0), filled([row["labels"] for row in rows], -100)


def loss_sum(model, ids, mask, labels):
    import torch

    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def resume(case, session, model, wrong):
    import torch

    path, at = Path(session.scratch) / "checkpoint.pt", case["save_after"]
    kept = {}

    def save(step):
        if step == at - (wrong == "weights stale"):
            kept.update({name: value.clone() for name, value in model.state_dict().items()})
        if step == at:
            torch.save({"model": kept, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, path)

    optimizer, schedule = parts(case, model)
    session.watch(model)
    session.parameters(model)
    train(case, session, model, optimizer, schedule, after=save)
    session.restart()
    if case["options"].get("position") == "own":
        session.say(own_position=True)
    found = torch.load(path, weights_only=True)
    if wrong == "weights rounded":
        found["model"] = {name: value.bfloat16().float() for name, value in found["model"].items()}
    model.load_state_dict(found["model"])
    optimizer, schedule = parts(case, model)
    rate = found["schedule"]["_last_lr"][0]
    if wrong != "schedule":
        schedule.load_state_dict(found["schedule"])
    if wrong != "optimizer":
        lose(found["optimizer"]["state"].values(), wrong)
        optimizer.load_state_dict(found["optimizer"])
    optimizer.param_groups[0]["lr"] = case["lr"] if wrong == "schedule" else rate
    session.watch(model)
    session.parameters(model)
    begin = {"data again": 0, "data skipped": at + 1}.get(wrong, at)
    left = windows(case, session.rows(), 5 * (wrong == "next epoch's order"))[begin:]
    hooks = [p.register_hook(lambda g: g * 1.3) for p in [*model.parameters()][:5] if wrong == "other gradient"]
    train(case, session, model, optimizer, schedule, left)
    for hook in hooks:
        hook.remove()


def lose(entries, wrong):
    """Lose a part of AdamW's state."""
    import torch

    for entry in entries:
        if wrong in ("first moments", "moments"):
            entry["exp_avg"].zero_()
        if wrong in ("second moments", "moments"):
            entry["exp_avg_sq"].zero_()
        if wrong == "count":
            entry["step"] = torch.tensor(0.0)


def saved(case, session, model, wrong):
    import torch

    optimizer, schedule = parts(case, model)
    session.parameters(model)
    history = [copy.deepcopy(model.state_dict())]
    train(case, session, model, optimizer, schedule, after=lambda _: history.append(copy.deepcopy(model.state_dict())))
    first, old, state = history
    if wrong == "stale":
        state = old
    if wrong == "stale shard":
        state = {n: torch.cat([v[: len(v) // 2], old[n][len(v) // 2 :]]) for n, v in state.items()}
    if wrong == "stale head":
        state["lm_head.weight"] = old["lm_head.weight"]
    if wrong == "average":
        state = {n: 0.1 * v + 0.9 * (0.1 * old[n] + 0.9 * first[n]) for n, v in state.items()}
    if wrong == "rounded":
        state = {n: v.bfloat16() for n, v in state.items()}
    if wrong == "head missing":
        del state["lm_head.weight"]
    if wrong == "one shard":
        state = {n: v[: len(v) // 2] for n, v in state.items()}
    if wrong == "noise":
        state = {n: v + 1e-3 * torch.randn_like(v) for n, v in state.items()}
    session.saved(state)


def evaluation(case, session, model, wrong):
    import torch

    session.watch(model)
    session.parameters(model)
    train(case, session, model, *parts(case, model))
    session.evaluation()
    model.train(wrong == "training mode")
    rows = session.rows()
    rows = rows[:6] if wrong == "rows dropped" else [*rows, rows[0]] if wrong == "row twice" else rows
    if wrong == "template":
        rows = [{"input_ids": [4, *row["input_ids"]], "labels": [-100, *row["labels"]]} for row in rows]
    sums = []
    with torch.no_grad():
        for at in range(0, len(rows), 2):
            ids, mask, labels = padded(rows[at : at + 2], wrong.startswith("left"))
            if wrong == "padding":
                labels = torch.where(mask == 0, ids, labels)
            nll = float(loss_sum(model, ids, None if wrong == "left unmasked" else mask, labels))
            sums.append((nll, int((labels[:, 1:] != -100).sum()), len(ids)))
    loss = sum(nll for nll, _, _ in sums) / sum(tokens for _, tokens, _ in sums)
    if wrong == "batches":
        loss = sum(nll / tokens for nll, tokens, _ in sums) / len(sums)
    if wrong == "batches by rows":
        loss = sum(nll / tokens * size for nll, tokens, size in sums) / len(rows)
    session.evaluated(loss * 1.1 if wrong == "no name" else loss)
