"""One round's training, by sentence-transformers' trainer."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers import PrinterCallback, ProgressCallback

from pt_dance import losses
from pt_dance.encoder.models import no_bars
from pt_dance.encoder.reading import prompt_for
from pt_dance.storage.folders import remove_folder
from pt_dance.training import checkpoints
from pt_dance.training.examples import EpochBatchSampler, Examples, columns_of
from pt_dance.training.kept_memory import keep_freed_memory
from pt_dance.training.token_cache import TokenCache

STATIC_LEARNING_RATE = 2e-2
TRANSFORMER_LEARNING_RATE = 2e-5


class _Bar(ProgressCallback):
    """The trainer's progress bar with the current loss behind it, instead of a dictionary a line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")


class RoundTrainer(SentenceTransformerTrainer):
    """The trainer, with the batches of :class:`EpochBatchSampler` and without a word on stdout unless asked.

    Its checkpoints are whole or not there, see :mod:`pt_dance.training.checkpoints`. ``loss_sum``, float64, is the sum
    of the losses of all steps, also of those before an interruption, which the trainer's own mean leaves out.
    """

    def __init__(self, *args, examples: Examples, verbose: bool, **kwargs):
        self.examples = examples
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self._writes_to: Path | None = None
        super().__init__(*args, train_dataset=examples.dataset, **kwargs)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if verbose:
            self.add_callback(_Bar())

    def add_model_card_callback(self, default_args_dict):
        """No card is computed from the training data in every round, since nobody would read it."""

    def get_batch_sampler(self, dataset, batch_size, drop_last, valid_label_columns=None, generator=None, seed=0):
        """Every epoch's own rows, shuffled, see :class:`EpochBatchSampler`."""
        return EpochBatchSampler(self.examples, batch_size, drop_last, seed)

    def training_step(self, *args, **kwargs):
        """A step of the trainer, whose loss is added up."""
        loss = super().training_step(*args, **kwargs)
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach().double()
        return loss

    def _save(self, output_dir=None, state_dict=None):
        # no model card, which takes longer than the weights, and no pickled arguments, which nobody reads
        self.model.save_pretrained(output_dir or self.args.output_dir, create_model_card=False)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._writes_to is None else str(self._writes_to)

    def _save_checkpoint(self, model, trial):
        if self.state.global_step >= self.state.max_steps:
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
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = building / f"checkpoint-{self.state.global_step}"
            checkpoints.publish(written, folder, {"loss_sum": self.loss_sum.item()})
            remove_folder(building)
        self.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """Keeps the libraries' bars for reading and writing checkpoints, and their notes, off the terminal."""
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


@dataclass
class Trained:
    """What training gave: the mean loss over all steps, and how many steps these were."""

    loss: float
    steps: int


def train(encoder, examples: Examples, round_, folder: str | Path, *, seed: int, verbose: bool) -> Trained:
    """Trains ``encoder`` in place on the examples of one round.

    Checkpoints go to ``folder``; if it holds one, training goes on from there. On a CPU the weights that come out
    depend on the encoder's weights, the examples, the round and the seed alone, whether training was interrupted or
    not.

    Args:
        encoder: ``DualEncoder`` whose weights are trained.
        examples: the round's rows.
        round_: ``Round`` with loss, batch size, learning rate and so on.
        folder: where checkpoints go.
        seed: fixes order and dropout.
        verbose: shows the trainer's progress bar.

    Returns:
        The mean training loss and the number of steps.

    Raises:
        ValueError: if the checkpoint to go on from is damaged, or the loss is no finite number any more.
    """
    folder = Path(folder)
    arguments = training_arguments(encoder, examples, round_, folder, seed=seed, verbose=verbose)
    options = dict(round_.loss_options)
    if isinstance(round_.loss, str):
        # train with the similarity that retrieval will use
        options.setdefault("similarity", encoder.similarity)
    loss = losses.make(round_.loss, encoder.model, examples.rows, **options)
    collator = SentenceTransformerDataCollator(
        preprocess_fn=TokenCache(encoder.model).preprocess if encoder.is_static else encoder.model.preprocess,
        router_mapping=arguments.router_mapping,
        prompts=arguments.prompts,
    )
    trainer = RoundTrainer(
        model=encoder.model, args=arguments, loss=loss, data_collator=collator, examples=examples, verbose=verbose
    )
    checkpoint = checkpoints.newest(folder)
    if checkpoint is not None:
        trainer.loss_sum += checkpoints.check(checkpoint)["loss_sum"]
    on_cpu = encoder.device.type == "cpu"
    with _no_chatter(), keep_freed_memory() if on_cpu else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    encoder.model.eval()
    steps = trainer.state.global_step
    loss = trainer.loss_sum.item() / max(steps, 1)
    if not math.isfinite(loss):
        raise ValueError(
            f"the training loss of round {round_.name!r} became {loss}: lower its learning_rate "
            f"({arguments.learning_rate:g}) or raise the loss's temperature, and fit in another folder"
        )
    return Trained(loss, steps)


def training_arguments(encoder, examples: Examples, round_, folder, *, seed: int, verbose: bool):
    """``SentenceTransformerTrainingArguments`` of a round; what ``round_.training_arguments`` says wins."""
    columns = columns_of(examples.rows)
    rate = round_.learning_rate or (STATIC_LEARNING_RATE if encoder.is_static else TRANSFORMER_LEARNING_RATE)
    prompts = {column: prompt_for(encoder.model, kind) for column, kind in columns.items()}
    arguments = dict(
        output_dir=str(folder),
        num_train_epochs=round_.epochs,
        per_device_train_batch_size=round_.batch_size,
        learning_rate=rate,
        warmup_steps=round_.warmup,
        lr_scheduler_type=round_.scheduler,
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        save_steps=round_.checkpoint_steps,
        save_total_limit=1,
        eval_strategy="no",
        logging_strategy="steps",
        logging_steps=50,
        # Adam's steps do not grow with the gradient, and the norm of a whole table costs a pass over it
        max_grad_norm=0.0 if encoder.is_static else 1.0,
        report_to="none",
        disable_tqdm=not verbose,
        use_cpu=encoder.device.type == "cpu",
        dataloader_pin_memory=encoder.device.type == "cuda",
        prompts={column: prompt for column, prompt in prompts.items() if prompt} or None,
        router_mapping=columns if encoder.has_two_towers else {},
    )
    return SentenceTransformerTrainingArguments(**{**arguments, **round_.training_arguments})
