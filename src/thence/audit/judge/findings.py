"""What the audit can say, in words for somebody who has never read the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FindingText:
    """One thing that can be found.

    Args:
        title: its name.
        meaning: what it does to training, one sentence.
        remedy: what to change, one sentence.
        says: the fault as a clause, "... was asked for, but in 2 cases <says>".
    """

    title: str
    meaning: str
    remedy: str
    says: str = ""


_COUNT = (
    "Count the trained tokens of all micro-batches and all ranks of the optimizer step before its first backward, and "
    "divide sums by that one number."
)

CATALOGUE: Mapping[str, FindingText] = {
    "micro-batch-mean": FindingText(
        "mean of micro-batch means",
        "A token counts the more the fewer tokens share its micro-batch, so short responses are over-weighted and the "
        "result changes with the micro-batch size.",
        _COUNT,
    ),
    "rank-mean": FindingText(
        "mean of rank means",
        "A token counts the more the fewer tokens its rank happens to hold, so the result changes with the number of "
        "ranks.",
        _COUNT,
    ),
    "pass-mean": FindingText(
        "mean over accumulation steps",
        "Each accumulation step counts the same however many tokens it holds, so short responses are over-weighted.",
        _COUNT,
    ),
    "sequence-mean": FindingText(
        "mean of sequence means",
        "Every response counts the same, so a token of a short response counts more than one of a long response.",
        "Sum over tokens and divide by the number of trained tokens, if a token mean is wanted.",
    ),
    "micro-batch-sequence-mean": FindingText(
        "mean over micro-batches of sequence means",
        "Rows in small micro-batches count more than rows in large ones.",
        "Divide the sum of sequence means by the number of rows of the whole step.",
    ),
    "constant-divisor": FindingText(
        "constant divisor",
        "The sum over tokens is divided by a constant, so steps with more tokens move the model further.",
        "Divide by the number of trained tokens of the step, if a token mean is wanted.",
    ),
    "token-mean": FindingText(
        "token mean",
        "Every token counts the same, where another objective was asked for.",
        "Look at the option that chooses the loss aggregation.",
    ),
    "first-only": FindingText(
        "first micro-batch only",
        "The gradient of every micro-batch but the first is thrown away before the optimizer sees it.",
        "Do not offload the optimizer, or install a version in which accumulated gradients reach it.",
        says="only the first micro-batch of an optimizer step reaches the model",
    ),
    "last-only": FindingText(
        "last micro-batch only",
        "The gradient of every micro-batch but the last is thrown away: it is overwritten, not added to.",
        "Let the engine count accumulation steps, or install a version that adds gradients up.",
        says="only the last micro-batch of an optimizer step reaches the model",
    ),
    "first-and-last-only": FindingText(
        "first and last micro-batch only",
        "The micro-batches between the first and the last never reach the optimizer; the logged loss stays right, so "
        "nothing shows it.",
        "Switch the optimizer offload off, or install a version in which accumulated gradients reach it.",
        says="only the first and the last micro-batch of an optimizer step reach the model",
    ),
    "rank-missing": FindingText(
        "a rank is missing",
        "The gradient of at least one rank does not reach the optimizer.",
        "Look at the all-reduce of gradients: every rank has to take part in every step.",
        says="the gradient of a rank does not reach the model",
    ),
    "rows-dropped": FindingText(
        "rows dropped",
        "The gradient of some rows of the step never reaches the optimizer.",
        "Look at what happens between backward and the optimizer step.",
        says="the gradient of some rows does not reach the model",
    ),
    "double-counted": FindingText(
        "examples counted more than once",
        "Some rows weigh a whole multiple of what they should.",
        "Look for rows that are repeated to fill a batch, or gradients that are added twice.",
        says="some examples count more than once",
    ),
    "rows-repeated": FindingText(
        "rows repeated to fill the window",
        "The sampler hands out some examples twice in one window, so that all ranks or micro-batches are full.",
        "Drop the incomplete window, or let the sampler hand out fewer rows.",
    ),
    "incomplete-window-scaled": FindingText(
        "incomplete window scaled wrongly",
        "The last, incomplete window is divided by the planned number of micro-batches, so its step is too small.",
        "Divide by what is in the window, not by the configured accumulation.",
        says="the last, incomplete window is scaled as if it were full",
    ),
    "window-mixed": FindingText(
        "windows mixed across epochs",
        "Micro-batches left over at the end of an epoch are put into the first step of the next one.",
        "Take a step, or throw the rest away, at the end of each epoch.",
        says="an optimizer step mixes rows of two epochs",
    ),
    "window-dropped": FindingText(
        "incomplete window dropped",
        "The rows of the last, incomplete window of an epoch are never trained.",
        "Say so in the settings, or take a step at the end of the epoch.",
    ),
    "leak": FindingText(
        "gradient of an earlier step",
        "Part of the gradient of an earlier step is applied again in this one (or the optimizer has momentum).",
        "Set gradients to zero after every optimizer step.",
        says="the gradient of an earlier step is applied again",
    ),
    "weight-decay": FindingText(
        "weight decay", "Part of the update pulls the weights towards zero.", "Set weight decay to 0 for the audit."
    ),
    "prompt-trained": FindingText(
        "prompt trained",
        "The model is trained to write the prompts too, and prompts take part in the normaliser.",
        "Mask the prompt in the labels (completion-only or assistant-only loss).",
        says="the prompt is trained too",
    ),
    "padding-trained": FindingText(
        "padding trained",
        "The model is trained to write padding after the response.",
        "Set the labels of padding to -100.",
        says="padding is trained too",
    ),
    "after-trained": FindingText(
        "template text after the response trained",
        "What the chat template writes behind the end token is trained too.",
        "Mask it, if the sampler stops at the end token.",
    ),
    "end-missing": FindingText(
        "end token not trained",
        "The model never learns to end a response, and generation runs on to its limit.",
        "Let the loss mask cover the end-of-turn token.",
        says="the token that ends a response is not trained",
    ),
    "first-missing": FindingText(
        "first response token not trained",
        "The model never learns how to begin a response.",
        "Let the loss mask begin at the first response token; look for a shift by one.",
        says="the first token of a response is not trained",
    ),
    "labels-shifted": FindingText(
        "labels shifted",
        "Each place is trained to predict a token that is not the next one.",
        "Labels are shifted once: by the model, or by the data preparation, not by both or none.",
        says="the labels are shifted",
    ),
    "contaminated": FindingText(
        "packed rows see each other",
        "A packed row attends to the examples before it, so it is trained in a context that it will never have.",
        "Use an attention that keeps packed examples apart, or switch packing off.",
        says="packed rows see the rows before them",
    ),
    "scale-accumulation": FindingText(
        "scale off by the number of micro-batches",
        "The update is as many times too large or too small as there are micro-batches in a step.",
        "Divide once: by the number of tokens of the step, and not by the accumulation steps as well.",
        says="the update is off by the number of micro-batches",
    ),
    "scale-ranks": FindingText(
        "scale off by the number of ranks",
        "The update is as many times too large or too small as there are ranks.",
        "Gradients averaged over ranks need a loss multiplied by the number of ranks, if it is divided by all tokens.",
        says="the update is off by the number of ranks",
    ),
    "scale": FindingText(
        "scale of the update",
        "The weights have the right shape but do not add up to what was asked for.",
        "Look at what the loss and the engine divide by.",
        says="the update has the wrong size",
    ),
    "no-step": FindingText(
        "no step taken",
        "The parameters did not change.",
        "Look at the accumulation boundary and at dropped batches.",
        says="no step was taken",
    ),
    "token-dependent": FindingText(
        "weights differ from token to token",
        "Tokens of one response get different weights, which follow the model's own probabilities.",
        "If a plain cross-entropy was asked for, look for a re-weighted loss.",
        says="the tokens of one response get different weights",
    ),
    "grouping": FindingText(
        "rows dealt in another order",
        "The micro-batches are not made of neighbouring rows; which rows went together is read from equal weights.",
        "Nothing, if the data is shuffled.",
    ),
    "unnamed": FindingText(
        "weights without a name",
        "Tokens do not get the weights asked for, and no objective that has a name gives these.",
        "Look at the weights of single tokens in the report.",
        says="the tokens get weights that no named objective gives",
    ),
    "advantage": FindingText(
        "advantage other than asked for",
        "The advantages in the update are not normalised as asked.",
        "Look at the option that scales rewards or advantages.",
        says="the advantages are not normalised as asked",
    ),
    "smoothing": FindingText(
        "label smoothing other than asked for",
        "The share of the loss that goes to the uniform distribution is not the one asked for.",
        "Look at the label smoothing option and its normaliser.",
        says="the label smoothing is not the one asked for",
    ),
    "ranks-differ": FindingText(
        "ranks hold different models",
        "After the step the ranks do not have the same parameters.",
        "Gradients have to be reduced over all ranks for every parameter.",
        says="the ranks end up with different models",
    ),
    "differs-by-parameter": FindingText(
        "weights differ from one parameter to another",
        "Some parameters got the gradient of other rows than others.",
        "Look for parameters that are left out of the all-reduce or of the accumulation.",
        says="some parameters get the gradient of other rows than the rest",
    ),
}
