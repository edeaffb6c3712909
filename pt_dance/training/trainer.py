"""One round's training, by sentence-transformers' trainer."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyterrier as pt
import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers import PrinterCallback, TrainerCallback

from pt_dance import losses
from pt_dance.encoder.models import no_bars
from pt_dance.encoder.reading import prompt_for
from pt_dance.storage.folders import remove_folder
from pt_dance.training import checkpoints
from pt_dance.training.batches import RoundBatches, batches_of_pass
from pt_dance.training.defaults import learning_rate
from pt_dance.training.examples import Examples, columns_of
from pt_dance.training.kept_memory import keep_freed_memory
from pt_dance.training.options import trainer_arguments
from pt_dance.training.processes import freeze_unused
from pt_dance.training.refresh.beside import Refreshes
from pt_dance.training.schedule import Span
from pt_dance.training.token_cache import TokenCache


class _Bar(TrainerCallback):
    """One progress bar for the steps of a round, with the current loss behind it."""

    def __init__(self, span: Span):
        self.span = span

    def on_train_begin(self, args, state, control, **kwargs):
        done = state.global_step - self.span.first_step
        self.bar = pt.tqdm(desc="training", total=self.span.steps, initial=done, unit="step", delay=1)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class _RoundEnd(TrainerCallback):
    """End the training with the round's last step, in the middle of a schedule that other rounds go on with."""

    def __init__(self, span: Span):
        self.span = span

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.span.last_step:
            control.should_log = control.should_training_stop = True
            control.should_save = self.span.carried_on
        return control


class RoundTrainer(SentenceTransformerTrainer):
    """The trainer, with the batches of :class:`RoundBatches` and without a word on stdout unless asked.

    Its checkpoints are whole or not there, see :mod:`pt_dance.training.checkpoints`. ``loss_sum``, float64, is the sum
    of this process's losses of all steps of the round, also of those before an interruption, which the trainer's own
    mean leaves out.
    """

    def __init__(
        self, *args, examples: Examples, span: Span, drops_last: bool, verbose: bool,
        version: Callable[[int], int] | None, **kwargs,
    ):  # fmt: skip
        self.examples = examples
        self.version = version
        self.span = span
        self.drops_last = drops_last
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self._writes_to: Path | None = None
        super().__init__(*args, train_dataset=examples.dataset, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(_RoundEnd(span))
        if verbose:
            self.add_callback(_Bar(span))

    def add_model_card_callback(self, default_args_dict):
        """Compute no card from the training data in every round, since nobody would read it."""

    def get_batch_sampler(self, dataset, batch_size, drop_last, valid_label_columns=None, generator=None, seed=0):
        """Return the batches of the schedule."""
        # for several processes sentence-transformers says to drop the last rows, which is not needed here
        processes = self.accelerator.num_processes
        return RoundBatches(self.examples, self.span, batch_size, self.drops_last, processes, self.version)

    def training_step(self, *args, **kwargs):
        """Take a step as the trainer does, and add up its loss."""
        loss = super().training_step(*args, **kwargs)
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach().double()
        return loss

    def mean_loss_sum(self) -> float:
        """Return the mean of ``loss_sum`` over all processes, each of which must ask for it."""
        return self.accelerator.reduce(self.loss_sum, "mean").item()

    def _save(self, output_dir=None, state_dict=None):
        # no model card, which takes longer than the weights, and no pickled arguments, which nobody reads
        self.model.save_pretrained(output_dir or self.args.output_dir, create_model_card=False)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._writes_to is None else str(self._writes_to)

    def _save_checkpoint(self, model, trial):
        if self.state.global_step >= self.span.last_step and not self.span.carried_on:
            return  # the encoder itself is written next
        folder = Path(self.args.output_dir)
        building = folder / checkpoints.BUILDING
        if self.args.should_save:
            remove_folder(building)
        self.accelerator.wait_for_everyone()
        self._writes_to = building
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_to = None
        loss_sum = self.mean_loss_sum()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = building / f"checkpoint-{self.state.global_step}"
            checkpoints.publish(written, folder, {"loss_sum": loss_sum})
            remove_folder(building)
        self.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """Keep the libraries' bars for reading and writing checkpoints, and their notes, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("sentence_transformers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with no_bars():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def train(
    encoder,
    examples: Examples,
    round_,
    span: Span,
    folder: str | Path,
    *,
    name: str = "the round",
    carried: str | Path | None = None,
    loggers: Sequence[TrainerCallback] = (),
    refreshes: Refreshes | None = None,
    verbose: bool = False,
) -> float:
    """Train ``encoder`` in place on the examples of one round.

    Checkpoints go to ``folder``; if it holds one, training goes on from there. A round in the middle of a schedule
    leaves its last one, with the optimiser's state, for the next. On a CPU the weights that come out depend on the
    encoder's weights, the examples, the round, the span (and the state that is carried) alone, whether training was
    interrupted or not. Weights are trained in float32, whatever their type was before.

    Args:
        encoder: ``DualEncoder`` whose weights are trained.
        examples: The round's rows, for the passes of its span.
        round_: ``Round`` with loss, batch size, learning rate and so on.
        span: The part of the schedule that the round trains.
        folder: Where checkpoints go.
        name: What errors call the round.
        carried: The folder of the round before, whose last checkpoint a round in the middle of a schedule begins with.
        loggers: Callbacks that are told what the trainer logs.
        refreshes: Of the negatives while training goes on; None where they stay.
        verbose: Shows a progress bar.

    Returns:
        The mean training loss over all steps of the round.

    Raises:
        ValueError: If the checkpoint to go on from is damaged or missing, no row has anything to learn from, or the
            loss is no finite number any more.
    """
    folder = Path(folder)
    encoder.model.float()
    arguments = training_arguments(encoder, examples, round_, span, folder)
    options = dict(round_.loss_options)
    parts = round_.loss if isinstance(round_.loss, (list, tuple)) else [(round_.loss,)]
    if all("similarity" in losses.options(part[0]) for part in parts):
        # train with the similarity that retrieval will use
        options.setdefault("similarity", encoder.similarity)
    if arguments.world_size > 1:
        options.setdefault("gather_across_devices", True)
        freeze_unused(encoder.model)
    loss = losses.make(round_.loss, encoder.model, examples.rows, **options)
    collator = SentenceTransformerDataCollator(
        preprocess_fn=TokenCache(encoder.model).preprocess if encoder.is_static else encoder.model.preprocess,
        router_mapping=arguments.router_mapping,
        prompts=arguments.prompts,
    )
    trainer = RoundTrainer(
        model=encoder.model, args=arguments, loss=loss, data_collator=collator, examples=examples, span=span,
        drops_last=bool(round_.training_arguments.get("dataloader_drop_last")), callbacks=list(loggers),
        verbose=verbose, version=None if refreshes is None else refreshes.version,
        optimizer_cls_and_kwargs=_optimizer(round_, arguments),
    )  # fmt: skip
    _check_gradients(loss, examples, span, round_.batch_size, encoder.dim, name)
    checkpoint = checkpoints.newest(folder)
    if checkpoint is not None:
        trainer.loss_sum += checkpoints.check(checkpoint)["loss_sum"]
    elif span.first_step:
        checkpoint = _carried(carried, span)
    on_cpu = encoder.device.type == "cpu"
    beside: contextlib.AbstractContextManager = contextlib.nullcontext()
    if refreshes is not None:
        trainer.add_callback(refreshes)
        beside = refreshes.beside(0 if checkpoint is None else checkpoints.step_of(checkpoint) - span.first_step)
    with beside, _no_chatter(), keep_freed_memory() if on_cpu else contextlib.nullcontext():
        if checkpoint is not None and checkpoints.step_of(checkpoint) == span.last_step:
            trainer._load_from_checkpoint(str(checkpoint))  # killed when all was trained but the encoder not written
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if trainer.state.global_step != span.last_step:
                taken = trainer.state.global_step
                raise RuntimeError(f"{name} ended after step {taken} of {span.last_step}: its batches ran out")
    encoder.model.eval()
    mean = trainer.mean_loss_sum() / span.steps
    if not math.isfinite(mean):
        raise ValueError(
            f"the training loss of {name} became {mean}: lower its learning_rate "
            f"({arguments.learning_rate:g}) or raise the loss's temperature, and fit in another folder"
        )
    return mean


def _optimizer(round_, arguments) -> tuple[type, dict[str, object]] | None:
    """Return what transformers makes no optimiser of by itself; None where it does."""
    if round_.training_arguments.get("optim") != "lamb":
        return None
    from pytorch_optimizer import Lamb

    betas = (arguments.adam_beta1, arguments.adam_beta2)
    # ANCE's release, as version 3 of LAMB's paper, does not correct the bias of the first steps
    return Lamb, {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon, "adam_debias": True}


def _check_gradients(loss, examples: Examples, span: Span, batch_size: int, dim: int, name: str) -> None:
    """Refuse to train where the loss has no gradient: in none of a pass's batches has a row any negative.

    The loss itself is asked, with random vectors in the place of embeddings, until a batch has a gradient: the first
    one, as a rule.
    """
    columns = len(columns_of(examples.rows))
    generator = torch.Generator().manual_seed(0)
    gathers, loss.gather_across_devices = loss.gather_across_devices, False  # here each process has whole batches
    try:
        for rows in batches_of_pass(examples, 0, batch_size, seed=span.stream_seed):
            vectors = torch.randn(columns, len(rows), dim, generator=generator, dtype=torch.float64).requires_grad_()
            value = loss.compute_loss_from_embeddings(list(vectors), torch.tensor(rows))
            if value.requires_grad and torch.autograd.grad(value, vectors)[0].any():
                return
    finally:
        loss.gather_across_devices = gathers
    raise ValueError(
        f"there is nothing to learn from in {name}: none of its {examples.pairs} (query, positive) pairs has a "
        f"negative; give it a source that finds some, or more pairs in a batch (batch_size={batch_size})"
    )


def _carried(folder: str | Path | None, span: Span) -> Path:
    """Return the checkpoint with which the round before ended."""
    checkpoint = None if folder is None else checkpoints.newest(Path(folder))
    if checkpoint is None or checkpoints.step_of(checkpoint) != span.first_step:
        raise ValueError(
            f"the optimiser's state after step {span.first_step}, which this round goes on with, is not in "
            f"{str(folder)!r}; remove the rounds that share its schedule (carry_optimizer), and fit trains them again"
        )
    checkpoints.check(checkpoint)
    return checkpoint


def keep_frozen(given, encoder) -> None:
    """Freeze in an encoder that was read from a round's folder what is frozen in the one a run was given.

    A folder of weights does not say which of them are to be trained; adapters come back frozen altogether.

    Args:
        given: ``DualEncoder`` of the run.
        encoder: ``DualEncoder`` with the same weights by name, to be trained.
    """
    wanted = {name: parameter.requires_grad for name, parameter in given.model.named_parameters()}
    for name, parameter in encoder.model.named_parameters():
        parameter.requires_grad_(wanted.get(name, parameter.requires_grad))


def training_arguments(encoder, examples: Examples, round_, span: Span, folder: str | Path):
    """Return the arguments of a round's training; what ``round_.training_arguments`` says wins."""
    columns = columns_of(examples.rows)
    prompts = {column: prompt_for(encoder.model, kind) for column, kind in columns.items()}
    arguments = dict(
        output_dir=str(folder),
        num_train_epochs=1,  # the whole schedule, see RoundBatches
        per_device_train_batch_size=round_.batch_size,  # of all processes together, see RoundBatches
        learning_rate=round_.learning_rate or learning_rate(encoder),
        warmup_steps=round_.warmup,
        lr_scheduler_type=round_.scheduler,
        seed=span.schedule_seed,
        data_seed=span.schedule_seed,
        save_strategy="steps",
        save_steps=round_.checkpoint_steps,
        save_total_limit=1,
        eval_strategy="no",
        logging_strategy="steps",
        logging_steps=50,
        # Adam's steps do not grow with the gradient, and the norm of a whole table costs a pass over it
        max_grad_norm=0.0 if encoder.is_static else 1.0,
        use_cpu=encoder.device.type == "cpu",
        # several processes: no weight is left without a gradient, see freeze_unused, but where each part of a batch has
        # a backward pass of its own (gradient caching), which may be of one tower only
        ddp_find_unused_parameters=round_.loss_options.get("mini_batch_size") is not None,
        # nothing here changes them, and processes make different numbers of forward passes, which would not pair up
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=encoder.device.type == "cuda",
        prompts={column: prompt for column, prompt in prompts.items() if prompt} or None,
        router_mapping=columns if encoder.has_two_towers else {},
    )
    # the fit has loggers and a bar of its own, over all rounds
    own = dict(report_to="none", disable_tqdm=True)
    return SentenceTransformerTrainingArguments(**{**arguments, **trainer_arguments(round_.training_arguments), **own})
