"""The training itself: models as they are loaded, batches, losses, and what `train` leaves."""

import logging
import random

import numpy as np
import pytest
import torch
from model_assets import HashingEmbedding
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses

from ft_core.errors import ArgumentError, TrainingError
from ft_crossencoder import training
from ft_crossencoder.choosing import Embedded, Passages, head_rows
from ft_crossencoder.rows import LOSSES, training_rows
from ft_crossencoder.settings import TrainingSettings
from ft_crossencoder.training import LOSS_CLASSES, LengthBatches, Run, custom_loss, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"epochs": 1, "batch_size": 16, "learning_rate": 4e-3, "precision": "fp32"}


@pytest.fixture
def run(tmp_path):
    def made(loss="listnet", head=False, **settings):
        return Run(
            settings=TrainingSettings(**{**QUICK, **settings}),
            checkpoints=tmp_path / "checkpoints",
            fingerprint="of this test",
            loss=loss,
            show_progress=False,
            head=head,
        )

    return made


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- Models ------------------------------------------------------------------------------------


def test_a_cross_encoder_keeps_its_head_and_a_plain_encoder_gets_one(task, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        scorer, has_head = load_model(task.scorer, device="cpu")
        fresh, has_fresh_head = load_model(task.encoder, device="cpu", seed=1)
    # What is missing on purpose is no news, and the libraries draw no bars.
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert (has_head, has_fresh_head) == (True, False)
    assert not moved(state(scorer), state(CrossEncoder(task.scorer, device="cpu")))
    assert fresh.num_labels == 1


def test_a_fresh_head_is_the_seeds(task):
    heads = [
        load_model(task.encoder, device="cpu", seed=seed)[0].model.classifier.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"model_id: '/.*/nowhere' cannot be loaded: \w+"):
        load_model(str(tmp_path / "nowhere"))


def test_a_classifier_of_several_classes_is_refused(task, tmp_path):
    resized = {"ignore_mismatched_sizes": True}
    classifier = CrossEncoder(task.scorer, num_labels=3, model_kwargs=resized, device="cpu")
    classifier.save_pretrained(str(tmp_path / "nli"))
    with pytest.raises(ArgumentError, match=r"model_id: .*nli' tells 3 classes apart; name one"):
        load_model(str(tmp_path / "nli"))


# --- Batches -----------------------------------------------------------------------------------


def batches(lengths, size, epoch=0, **settings):
    rows = [{"query": "q", "documents": ["d", "x" * n], "label": [1.0, 0.0]} for n in lengths]
    sampler = LengthBatches(rows, size, **{"seed": 7, **settings})
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def test_every_row_is_in_one_batch_and_rows_of_a_batch_are_alike():
    rng = random.Random(0)
    lengths = [rng.randint(1, 500) for _ in range(203)]
    found = batches(lengths, 10)
    assert sorted(row for batch in found for row in batch) == list(range(203))
    spread = [max(lengths[r] for r in b) - min(lengths[r] for r in b) for b in found]
    assert np.mean(spread) < 60
    longest = [max(lengths[row] for row in batch) for batch in found]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_every_epoch_has_its_own_order_and_has_it_again():
    lengths = list(range(1, 120))
    first, second = batches(lengths, 8, epoch=0), batches(lengths, 8, epoch=1)
    assert first != second
    assert batches(lengths, 8, epoch=1) == second
    assert batches(lengths, 8, epoch=0, seed=8) != first


def test_a_short_last_batch_can_be_dropped():
    found = batches(range(1, 24), 5, drop_last=True)
    assert [len(batch) for batch in found] == [5] * 4


@pytest.mark.parametrize(
    ("loss", "rows_of_a_batch"),
    [("listnet", 5), ("multiple_negatives_ranking", 5), ("binary_cross_entropy", 16)],
)
def test_the_batch_size_counts_pairs(task, run, loss, rows_of_a_batch):
    model, _ = load_model(task.scorer, device="cpu")
    rows = training_rows(task.train, loss, negatives=2, seed=0)
    trainer = training._trainer(model, rows, run(loss))
    assert trainer.args.per_device_train_batch_size == rows_of_a_batch
    again = training._trainer(model, rows, run(custom_loss(model, LOSS_CLASSES[loss])))
    assert again.args.per_device_train_batch_size == rows_of_a_batch


# --- Losses ------------------------------------------------------------------------------------


def test_every_name_has_rows_and_a_class():
    assert LOSSES.keys() == LOSS_CLASSES.keys()


def loss_of(model, name, row):
    """Return a loss on one row, through sentence-transformers' own collator."""
    loss = LOSS_CLASSES[name](model)
    columns = [[row[key]] for key in row if key != "label"]
    label = row.get("label")
    wanted = [torch.tensor(label)] if isinstance(label, list) else torch.tensor([label or 0.0])
    return loss(columns, wanted).item()


def logits(model, query, texts):
    pairs = [(query, text) for text in texts]
    return torch.tensor(model.predict(pairs, activation_fn=torch.nn.Identity()))


def test_the_lists_are_what_the_softmax_of_listnet_takes(cross_encoder, all_texts):
    row = {"query": "harbour", "documents": all_texts[:3], "label": [10.0, 0.0, 5.0]}
    found = logits(cross_encoder, "harbour", row["documents"])
    expected = -(torch.tensor(row["label"]).softmax(0) * found.log_softmax(0)).sum()
    assert loss_of(cross_encoder, "listnet", row) == pytest.approx(float(expected), rel=1e-4)


def test_the_scores_of_a_row_are_what_margin_mse_takes(cross_encoder, all_texts):
    texts, scores = all_texts[:3], [1.5, 0.25, -1.0]
    names = ("positive", "negative_1", "negative_2")
    row = {"query": "harbour", **dict(zip(names, texts, strict=True)), "label": scores}
    found = logits(cross_encoder, "harbour", texts)
    margins = (found[0] - found[1:]) - (scores[0] - torch.tensor(scores[1:]))
    expected = float((margins**2).mean())
    assert loss_of(cross_encoder, "margin_mse", row) == pytest.approx(expected, rel=1e-4)


def test_mse_is_learned_on_the_logit(cross_encoder, all_texts):
    row = {"query": "harbour", "document": all_texts[0], "label": 2.5}
    found = float(logits(cross_encoder, "harbour", all_texts[:1])[0])
    assert loss_of(cross_encoder, "mse", row) == pytest.approx((found - 2.5) ** 2, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        (losses.ListNetLoss, "listnet"),
        (losses.LambdaLoss, "lambda"),
        (losses.RankNetLoss, "lambda"),
        (losses.CachedMultipleNegativesRankingLoss, "multiple_negatives_ranking"),
        (losses.MarginMSELoss, "margin_mse"),
        (lambda model: losses.MSELoss(model), "mse"),
        (losses.BinaryCrossEntropyLoss, "binary_cross_entropy"),
    ],
)
def test_a_loss_of_sentence_transformers_gets_the_rows_it_takes(cross_encoder, loss, rows):
    assert training.rows_of(custom_loss(cross_encoder, loss)) == rows


def test_a_loss_object_is_given_the_model_that_is_trained(cross_encoder, task):
    other = CrossEncoder(task.scorer, device="cpu")
    loss = losses.BinaryCrossEntropyLoss(other)
    assert custom_loss(cross_encoder, loss) is loss
    assert loss.model is cross_encoder


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (5, "loss: 5 cannot be called with the model"),
        (lambda: None, "loss: .* cannot be called with the model"),
        (lambda model: 1.0, "loss: .* returned a float, no loss"),
    ],
)
def test_what_is_no_loss_is_named(cross_encoder, loss, message):
    with pytest.raises(ArgumentError, match=message):
        custom_loss(cross_encoder, loss)


# --- Training ----------------------------------------------------------------------------------


@pytest.fixture
def scorer(task):
    return load_model(task.scorer, device="cpu")[0]


@pytest.fixture
def rows(task):
    return training_rows(task.train, "listnet", negatives=2, seed=0)


def test_the_lowest_layers_stay_frozen_and_can_be_trained_again(scorer, rows, run):
    before = state(scorer)
    training.train(scorer, rows, run(frozen_share=0.5))
    changed = moved(before, state(scorer))
    assert not [n for n in changed if ".embeddings." in n or ".layer.0." in n]
    assert [n for n in changed if ".layer.1." in n]
    assert [n for n in changed if "classifier" in n]
    assert all(parameter.requires_grad for parameter in scorer.parameters())
    assert not scorer.training


def test_max_length_cuts_in_training_and_not_afterwards(task, run, monkeypatch):
    model, _ = load_model(task.scorer, device="cpu")
    widths = []
    forward = model.model.forward

    def spy(*args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", spy)
    rows = [{"query": "harbour", "documents": ["gates " * 60, "coins " * 60], "label": [10.0, 0.0]}]
    training.train(model, rows, run(max_length=20))
    assert set(widths) == {20}
    assert model.max_seq_length == 512
    training.train(model, rows, run(max_length=100_000))
    assert max(widths) > 60


def test_nan_weights_are_an_error_that_names_the_rate_that_was_used(task, run):
    pairs = training_rows(task.train, "binary_cross_entropy", negatives=2, seed=0)
    for head, name in ((False, "learning_rate"), (True, "head_learning_rate")):
        model, _ = load_model(task.scorer, device="cpu")
        wild = run("binary_cross_entropy", head=head, **{name: float("inf")})
        with pytest.raises(TrainingError, match=rf"lower {name} \(it was inf\)"):
            training.train(model, pairs, wild)


def test_checkpoints_of_another_run_are_refused_and_foreign_files_stay(scorer, rows, run):
    own = run(epochs=1)
    training.train(scorer, rows, own)
    own.fingerprint, own.resume = "another", True
    with pytest.raises(TrainingError, match="checkpoints of other data or settings"):
        training.train(scorer, rows, own)
    (own.checkpoints / "run.json").unlink()
    with pytest.raises(TrainingError, match="is in the way of the checkpoints; move it"):
        training.train(scorer, rows, own)


def test_a_scheduler_that_is_none_is_named(scorer, rows, run):
    with pytest.raises(
        ArgumentError, match=r"scheduler: is one of linear, cosine, .* not 'zigzag'"
    ):
        training.train(scorer, rows, run(scheduler="zigzag"))


def test_training_is_silent_where_there_is_no_terminal(scorer, rows, run, capfd):
    training.train(scorer, rows, run(epochs=1))
    assert capfd.readouterr() == ("", "")


def correlation(model, embedded, dataset):
    """How far a model's scores of all pairs go along with an embedding's."""
    ours, theirs = [], []
    for query in dict.fromkeys(example.query for example in dataset):
        ours += logits(model, query, embedded.passages).tolist()
        theirs += embedded.scores(query).tolist()
    return float(np.corrcoef(ours, theirs)[0, 1])


class Prices(HashingEmbedding):
    """Takes every question for one about the price."""

    def _get_query_embedding(self, query):
        return self.vector("ticket price")


def test_a_fresh_head_learns_an_embeddings_scores_and_has_them_for_other_texts(task, run):
    model, has_head = load_model(task.plain, device="cpu")
    assert not has_head

    def embedded(dataset):
        passages = Passages(dataset, model.tokenizer, None).distinct()
        return Embedded(dataset, passages, Prices(), show_progress=False)

    unseen = embedded(task.heldout)
    before = correlation(model, unseen, task.heldout)
    rows = head_rows(task.train, embedded(task.train), pairs=240, seed=0)
    training.train(model, rows, run("mse", head=True, head_learning_rate=4e-3, epochs=4))
    after = correlation(model, unseen, task.heldout)
    assert abs(before) < 0.5
    assert after > 0.8
