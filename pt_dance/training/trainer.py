"""One round's training, by sentence-transformers' trainer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from pt_dance import losses
from pt_dance._reading import prompt_for
from pt_dance.training.examples import EpochBatchSampler, Examples, columns_of
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
    """The trainer, with the batches of :class:`EpochBatchSampler` and without a word on stdout unless asked."""

    def __init__(self, *args, examples: Examples, verbose: bool, **kwargs):
        self.examples = examples
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
    """
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
    checkpoint = get_last_checkpoint(str(folder)) if os.path.isdir(folder) else None
    result = trainer.train(resume_from_checkpoint=checkpoint)
    encoder.model.eval()
    return Trained(float(result.training_loss), int(result.global_step))


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
