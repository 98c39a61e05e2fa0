"""The losses for sentence-transformers in the real library; tiny models, made offline."""

import copy
import doctest
import json
import os
import pickle
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fedss_kernels import RowAdam

DOCS = Path(__file__).parents[1] / "docs" / "sentence_transformers.md"
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def library(transformers):
    missing = "needs sentence-transformers, of the extra integrations, which is not installed"
    return pytest.importorskip("sentence_transformers", reason=missing)


@pytest.fixture
def plug(library):
    from fedss_kernels.integrations import sentence_transformers as plug

    return plug


def static_model(library):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return library.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")


def bert_model(library, folder):
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformer = Transformer(str(folder))
    return library.SentenceTransformer(modules=[transformer, Pooling(16, "mean")], device="cpu")


@pytest.fixture(params=["static", "bert"])
def model(library, request, tmp_path):
    return static_model(library) if request.param == "static" else bert_model(library, tmp_path)


def columns_of(model, *texts):
    return [model.preprocess(list(column)) for column in texts]


def gradients(loss, model, columns, labels=None):
    model.zero_grad()
    value = loss([dict(column) for column in columns], labels)
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


ANCHORS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
POSITIVES = ["w11", "w12 w13", "w14 w15 w16 w17", "w18"]
NEGATIVES = ["w21 w22 w23 w24 w25", "w22", "w23", "w24"]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_where_nothing_repeats_it_is_multiple_negatives_ranking_loss(library, plug, model, hard, similarity):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import cos_sim, dot_score

    texts = [ANCHORS, POSITIVES, NEGATIVES] if hard else [ANCHORS, POSITIVES]
    columns, scale = columns_of(model, *texts), 20.0 if similarity == "cosine" else 1.0
    function = cos_sim if similarity == "cosine" else dot_score
    theirs = MultipleNegativesRankingLoss(model, scale=scale, similarity_fct=function)
    expected, wanted = gradients(theirs, model, columns)
    for loss, labels in [
        (plug.InBatchSoftmaxLoss(model, scale=scale, similarity=similarity), None),
        (
            plug.InBatchSoftmaxLoss(model, scale=scale, similarity=similarity, same_item="label"),
            torch.arange(4),
        ),
    ]:
        value, found = gradients(loss, model, columns, labels)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert len(found) == len(wanted) > 0
        for ours, its in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("same_item", ["text", "label"])
def test_a_repeated_item_is_no_negative_of_itself(library, plug, model, same_item):
    """By text: of another length of padding, and among the hard negatives too."""
    positives = [POSITIVES[0], POSITIVES[1], POSITIVES[0], POSITIVES[3]]
    negatives = [NEGATIVES[0], POSITIVES[1], NEGATIVES[2], NEGATIVES[3]]
    columns = columns_of(model, ANCHORS, positives, negatives)
    labels = torch.tensor([7, 8, 7, 9])
    value, found = gradients(plug.InBatchSoftmaxLoss(model, same_item=same_item), model, columns, labels)

    def formula(columns, labels):
        a, p, n = (F.normalize(model(column)["sentence_embedding"], dim=1) for column in columns)
        logits = 20 * a @ torch.cat([p, n]).T
        left_out = torch.zeros(4, 8, dtype=torch.bool)
        left_out[0, 2] = left_out[2, 0] = True
        left_out[1, 5] = same_item == "text"  # a label says nothing of hard negatives
        return F.cross_entropy(logits.masked_fill(left_out, -torch.inf), torch.arange(4))

    expected, wanted = gradients(formula, model, columns)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for ours, its in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_may_be_any_integers(library, plug, dtype):
    model, labels = static_model(library), torch.tensor([3, 4, 3, 1])
    for loss, columns in (
        (plug.InBatchSoftmaxLoss(model, same_item="label"), columns_of(model, ANCHORS, POSITIVES, NEGATIVES)),
        (plug.ClassSoftmaxLoss(model, 5), columns_of(model, ANCHORS)),
    ):
        assert loss(columns, labels.to(dtype)) == loss(columns, labels)
        with pytest.raises(TypeError, match="labels: expected int64 or .*, got float32"):
            loss(columns, labels.float())
        with pytest.raises(
            ValueError, match=r"labels: expected shape \(4,\) = one for each text, got \(3,\)"
        ):
            loss(columns, labels[:3])


def test_the_model_card_has_a_scale_that_was_a_tensor(plug, model):
    config = plug.InBatchSoftmaxLoss(model, scale=torch.tensor(20.0)).get_config_dict()
    assert json.loads(json.dumps(config))["scale"] == 20.0


def test_texts_of_the_same_words_in_another_order_are_two_items(plug, model):
    (column,) = columns_of(model, ["w1 w2", "w2 w1", "w1 w2", "w1", "w1 w1", "w3 w0", "w2 w1 w1"])
    found = plug._token_hash(column)
    assert found.dtype == torch.int64 and found[0] == found[2] and len(set(found.tolist())) == 6


def test_one_class_matrix_for_all_sentences_is_softmax_over_them(plug, model):
    loss = plug.ClassSoftmaxLoss(model, 50, scale=5.0)
    columns, labels = columns_of(model, ANCHORS), torch.tensor([3, 49, 3, 0])
    value, _ = gradients(loss, model, columns, labels)
    embeddings = F.normalize(model(dict(columns[0]))["sentence_embedding"], dim=1)
    logits = 5 * embeddings @ F.normalize(loss.criterion.weight, dim=1).T
    torch.testing.assert_close(value, F.cross_entropy(logits, labels).detach())
    assert loss.criterion.topk(embeddings, 1).indices[:, 0].equal(logits.argmax(1))


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[3])
import test_integration_sentence_transformers as test
import sentence_transformers
from fedss_kernels.integrations.sentence_transformers import InBatchSoftmaxLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
model = test.static_model(sentence_transformers)
texts = [column[2 * rank : 2 * rank + 2] for column in (test.ANCHORS, test.POSITIVES, test.NEGATIVES)]
columns = test.columns_of(model, *texts)
theirs = MultipleNegativesRankingLoss(model, gather_across_devices=True)
expected, wanted = test.gradients(theirs, model, columns)
alone = test.gradients(InBatchSoftmaxLoss(model), model, columns)[0]
assert abs(alone - expected) > 0.01
for same_item, labels in ("text", None), ("label", torch.arange(2) + 2 * rank):
    loss = InBatchSoftmaxLoss(model, gather_across_devices=True, same_item=same_item)
    value, found = test.gradients(loss, model, columns, labels)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-5)
dist.barrier()
dist.destroy_process_group()  # else its threads may outlive the interpreter
"""


@pytest.mark.exhaustive
def test_gathered_across_two_processes_it_is_multiple_negatives_ranking_loss(library, tmp_path):
    command = [sys.executable, "-c", TWO_RANKS]
    more = [str(tmp_path / "meeting"), str(Path(__file__).parent)]
    ranks = [subprocess.Popen([*command, str(rank), *more], stderr=subprocess.PIPE) for rank in range(2)]
    for each in ranks:
        errors = each.communicate(timeout=300)[1].decode()
        assert each.returncode == 0, errors


def test_wrong_calls_are_refused_in_words(plug, library):
    model = static_model(library)
    columns = columns_of(model, ANCHORS, POSITIVES)
    with pytest.raises(ValueError, match="expected one column of texts beside the labels, got 2"):
        plug.ClassSoftmaxLoss(model, 5)(columns, torch.arange(4))
    with pytest.raises(ValueError, match=r"expected columns \(anchor, positive, ...\), got 1"):
        plug.InBatchSoftmaxLoss(model)(columns[:1])
    with pytest.raises(ValueError, match="expected a label column"):
        plug.InBatchSoftmaxLoss(model, same_item="label")(columns)
    with pytest.raises(ValueError, match="same_item"):
        plug.InBatchSoftmaxLoss(model, same_item="id")
    with pytest.raises(ValueError, match='expected "input_ids"'):
        plug._token_hash({"pixel_values": torch.zeros(1)})


def train(library, model, loss, data, folder, steps, callbacks=(), resume=None, **options):
    from datasets import Dataset

    pytest.importorskip("accelerate")
    options = {"save_strategy": "no", "learning_rate": 3e-2, "lr_scheduler_type": "constant"} | options
    arguments = library.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=3, **options,
    )  # fmt: skip
    trainer = library.SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        loss=loss,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


CLASSES = {
    "text": [f"{WORDS[i % 40]} {WORDS[i * 7 % 40]}" for i in range(64)],
    "label": [i * 3 for i in range(64)],
}
LIBRARYS_OWN = pytest.mark.filterwarnings("default")


@LIBRARYS_OWN
def test_the_trainer_optimises_the_class_matrix(library, plug, tmp_path):
    model = static_model(library)
    loss = plug.ClassSoftmaxLoss(model, 200, num_sampled=40)
    before = loss.criterion.weight.detach().clone()
    found = train(library, model, loss, CLASSES, tmp_path, 40)
    assert found[-5:].mean() < found[:5].mean() / 2
    moved = (loss.criterion.weight - before).abs().sum(1) > 0
    assert moved[:190:3].all()


@LIBRARYS_OWN
def test_a_resumed_run_goes_on_with_the_class_matrix(library, plug, tmp_path):
    def run(folder, resume=None, resumed_from=None):
        model = static_model(library)
        torch.manual_seed(len(str(resume)))  # another class matrix at first
        loss = plug.ClassSoftmaxLoss(model, 200)
        options = {"save_strategy": "steps", "save_steps": 4, "resume": resume}
        train(library, model, loss, CLASSES, folder, 8, [loss.checkpoints(resumed_from)], **options)
        return loss.criterion.weight.detach()

    whole, checkpoint = run(tmp_path / "whole"), str(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(run(tmp_path / "whole", checkpoint), whole)
    assert torch.equal(run(tmp_path / "again", checkpoint, checkpoint), whole)
    with pytest.raises(
        FileNotFoundError, match="resumed_from: expected the checkpoint with the class matrix"
    ):
        run(tmp_path / "other", checkpoint)


@LIBRARYS_OWN
def test_a_resumed_run_goes_on_with_the_generator(library, plug, tmp_path):
    def run(resume=None):
        model, generator = static_model(library), torch.Generator().manual_seed(3)
        loss = plug.ClassSoftmaxLoss(model, 200, num_sampled=20, generator=generator)
        options = {"save_strategy": "steps", "save_steps": 4, "resume": resume}
        train(library, model, loss, CLASSES, tmp_path, 8, [loss.checkpoints()], **options)
        return loss.criterion.weight.detach()

    whole = run()
    assert torch.equal(run(str(tmp_path / "checkpoint-4")), whole)


@LIBRARYS_OWN
def test_the_best_model_has_the_class_matrix_that_belongs_to_it(library, plug, tmp_path):
    """And by eval_loss, which is over all classes, the same each time."""
    from datasets import Dataset

    pytest.importorskip("accelerate")
    model, data = static_model(library), Dataset.from_dict(CLASSES)
    loss = plug.ClassSoftmaxLoss(model, 200, num_sampled=20)
    arguments = library.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=4, learning_rate=0.5, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the last is not the best
        per_device_eval_batch_size=64, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = library.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss,
        callbacks=[loss.checkpoints()],
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{trainer.state.global_step}"
    saved = torch.load(best / "class_softmax_loss.pt", weights_only=True)
    assert torch.equal(loss.criterion.weight, saved["weight"])
    assert {trainer.evaluate()["eval_loss"] for _ in range(3)} == {trainer.state.best_metric}
    assert loss.criterion.training


def _wraps():
    """As who trains without the trainer does it too: each makes of a loss' model one of all processes."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def ddp(loss):
        loss.model = DistributedDataParallel(loss.model)

    def shards(loss):
        fully_shard(loss.model)

    def shards_left_whole(loss):
        fully_shard(loss.model)
        loss.model(columns_of(loss.model, ANCHORS)[0])

    def shards_within(loss):
        fully_shard(loss.model[0].embedding)

    def shards_within_left_whole(loss):
        fully_shard(loss.model[0].embedding)
        loss.model(columns_of(loss.model, ANCHORS)[0])

    def flat_shards(loss):
        loss.model = FullyShardedDataParallel(loss.model, device_id=torch.device("cpu"))

    def flat_shards_of_one_process(loss):
        groups = torch.distributed.new_subgroups(1)[0], torch.distributed.group.WORLD
        loss.model = FullyShardedDataParallel(
            loss.model, groups, device_id=torch.device("cpu"), sharding_strategy=HYBRID_SHARD
        )

    HYBRID_SHARD = torch.distributed.fsdp.ShardingStrategy.HYBRID_SHARD
    within = shards_within, shards_within_left_whole
    return ddp, shards, shards_left_whole, *within, flat_shards, flat_shards_of_one_process


def _mean_gradients(rank, meet, sparse_grad, seed):
    import sentence_transformers as library

    from fedss_kernels.integrations.sentence_transformers import ClassSoftmaxLoss

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2)
    for wrap in _wraps():
        model = static_model(library)
        torch.manual_seed(seed * rank)
        loss = ClassSoftmaxLoss(model, 30, bias=True, learn_scale=True, sparse_grad=sparse_grad)
        columns, labels = columns_of(model, ANCHORS[2 * rank :][:2]), torch.tensor([3, 4]) + 5 * rank
        alone = ClassSoftmaxLoss(copy.deepcopy(model), 30, bias=True, learn_scale=True)
        wrap(loss)
        for time in range(2):  # added up
            loss(columns, labels).backward()
            if time == 0:  # with what is the first one's by now
                alone.criterion.load_state_dict(loss.criterion.state_dict())
            alone(columns, labels).backward()
        for mine, its in zip(loss.criterion.parameters(), alone.criterion.parameters(), strict=True):
            parts = [torch.zeros_like(mine) for _ in range(2)]
            torch.distributed.all_gather(parts, mine.detach())
            assert torch.equal(*parts), wrap.__name__
            torch.distributed.all_reduce(its.grad)
            grad = mine.grad.to_dense() if mine.grad.is_sparse else mine.grad
            torch.testing.assert_close(grad, its.grad / 2, msg=wrap.__name__)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_several_processes_train_one_class_matrix(library, sparse_grad, tmp_path):
    arguments = tmp_path / "meet", sparse_grad, 7
    torch.multiprocessing.spawn(_mean_gradients, arguments, nprocs=2)


def _as_rank(rank, folder, world):
    """A process as torchrun starts it; what waits for another for half a minute fails."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # asked for, not used
    start, patience = f"file://{folder / 'meet'}", timedelta(seconds=30)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", start, patience, rank=rank, world_size=world)


def _end_of_rank():
    """At once, when all are there: gloo's threads can wait for the interpreter as it waits for them."""
    torch.distributed.barrier()
    os._exit(0)


TEXTS = [f"{WORDS[i % 40]} {WORDS[i * 7 % 40]}" for i in range(32)]
DATA_SETS = {
    "a": {"text": TEXTS, "label": [i * 3 for i in range(32)]},
    "b": {"text": TEXTS[::-1], "label": list(range(32))},
    "c": {"anchor": TEXTS, "positive": WORDS[:32]},
}


def trainer_of_data_sets(
    library, model, losses, folder, steps, callbacks=(), optimizers=(None, None), **options
):
    """A loss for each data set; of two, or one, processes."""
    from datasets import Dataset, DatasetDict

    data = DatasetDict({name: Dataset.from_dict(DATA_SETS[name]) for name in losses})
    options = {"save_strategy": "no", "lr_scheduler_type": "constant"} | options
    arguments = library.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        learning_rate=1e-2, weight_decay=0.1, seed=3, disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    return library.SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        loss=losses,
        optimizers=optimizers,
        callbacks=list(callbacks),
    )


def _several_losses(rank, folder, world, runs):
    """Trains two class matrices and in-batch negatives; saves all parameters as they are in the end."""
    import sentence_transformers as library

    from fedss_kernels.integrations.sentence_transformers import ClassSoftmaxLoss, InBatchSoftmaxLoss

    if world > 1:
        _as_rank(rank, folder, world)
    for name, (sparse_grad, accumulated, resumes) in runs.items():
        model, own = static_model(library), folder / f"{name}{world}"
        torch.manual_seed(7 + rank)
        first = ClassSoftmaxLoss(model, 100, bias=True, learn_scale=True, sparse_grad=sparse_grad)
        second = ClassSoftmaxLoss(model, 50, sparse_grad=sparse_grad)
        parameters = [*model.parameters(), *first.criterion.parameters(), *second.criterion.parameters()]
        trainer = trainer_of_data_sets(
            library,
            model,
            {"a": first, "b": second, "c": InBatchSoftmaxLoss(model)},
            own,
            6 // accumulated,
            [first.checkpoints(name="first"), second.checkpoints(name="second")],
            optimizers=(RowAdam(parameters, lr=1e-2) if sparse_grad else None, None),
            gradient_accumulation_steps=accumulated * 2 // world,
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train()
        if resumes:
            with torch.no_grad():
                first.criterion.weight.add_(1)
            trainer.train(resume_from_checkpoint=str(own / "checkpoint-3"))
        trainer.evaluate()
        torch.save([parameter.detach() for parameter in parameters], own / f"of-rank-{rank}.pt")
    if world > 1:
        _end_of_rank()


@pytest.mark.exhaustive
@LIBRARYS_OWN
def test_processes_in_different_losses_train_as_one_that_accumulates(library, tmp_path):
    """In some steps a loss has a batch in one process, in some in none: then it is not to decay."""
    pytest.importorskip("accelerate")
    runs = {"plain": (False, 1, True), "accumulates": (False, 2, False), "sparse": (True, 1, False)}
    _several_losses(0, tmp_path, 1, runs)
    torch.multiprocessing.spawn(_several_losses, (tmp_path, 2, runs), nprocs=2)
    for name in runs:
        files = (f"{name}{world}/of-rank-{rank}.pt" for world, rank in ((1, 0), (2, 0), (2, 1)))
        for expected, found, other in zip(*(torch.load(tmp_path / file) for file in files), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(found, other)


def _refused_of_several_losses(rank, folder):
    import sentence_transformers as library

    from fedss_kernels.integrations.sentence_transformers import ClassSoftmaxLoss, InBatchSoftmaxLoss

    _as_rank(rank, folder, 2)

    def trainer(make, names="ab", **options):
        model = static_model(library)
        losses = {name: make(model) for name in names}
        callbacks = [each.checkpoints(name=n) for n, each in losses.items()] if options.get("fp16") else []
        return trainer_of_data_sets(library, model, losses, folder, 2, callbacks, **options)

    with pytest.raises(ValueError, match=r"callbacks: expected a loss.checkpoints\(name=...\) of each"):
        trainer(lambda model: ClassSoftmaxLoss(model, 100)).train()
    with pytest.raises(ValueError, match="fp16: expected False in a trainer with several losses"):
        trainer(lambda model: ClassSoftmaxLoss(model, 100), fp16=True).train()
    with pytest.raises(ValueError, match="gather_across_devices: expected False, as the trainer has several"):
        DATA_SETS["d"] = DATA_SETS["c"]
        trainer(lambda model: InBatchSoftmaxLoss(model, gather_across_devices=True), names="cd").train()
    made: list = []  # one loss of both data sets is in all processes in every step

    def the_same(model):
        made[:] = made or [ClassSoftmaxLoss(model, 100)]
        return made[0]

    trainer(the_same).train()
    weight = made[0].criterion.weight.detach()
    parts = [torch.zeros_like(weight) for _ in range(2)]
    torch.distributed.all_gather(parts, weight)
    assert torch.equal(*parts)
    with pytest.raises(ValueError, match=r"callbacks: expected a loss.checkpoints\(name=...\) of each"):
        trained = iter(made)  # which has hooks by now
        trainer(lambda model: next(trained, None) or ClassSoftmaxLoss(model, 100)).train()
    made[0].model = static_model(library)  # which goes everywhere, as what wraps it for several does not
    for copied in (copy.deepcopy(made[0]), pickle.loads(pickle.dumps(made[0]))):
        assert torch.equal(copied.criterion.weight, weight)
        assert not copied.criterion.weight._post_accumulate_grad_hooks
    _end_of_rank()


@pytest.mark.exhaustive
@LIBRARYS_OWN
def test_what_processes_in_different_losses_cannot_share_is_refused(library, tmp_path):
    pytest.importorskip("accelerate")
    torch.multiprocessing.spawn(_refused_of_several_losses, (tmp_path,), nprocs=2)


@LIBRARYS_OWN
def test_several_losses_of_a_trainer_need_a_name_each(library, plug, tmp_path):
    pytest.importorskip("accelerate")
    model = static_model(library)
    losses = {"a": plug.ClassSoftmaxLoss(model, 100), "b": plug.ClassSoftmaxLoss(model, 50)}
    callbacks = [loss.checkpoints() for loss in losses.values()]
    options = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(
        ValueError, match=r"name: expected another .* 'class_softmax_loss' twice, of 50 and 100 classes"
    ):
        trainer_of_data_sets(library, model, losses, tmp_path, 2, callbacks, **options).train()
    assert not list(tmp_path.glob("checkpoint-*"))
    callbacks = [loss.checkpoints(name=name) for name, loss in losses.items()]
    trainer_of_data_sets(library, model, losses, tmp_path, 2, callbacks, **options).train()
    assert {file.name for file in (tmp_path / "checkpoint-2").glob("[ab].pt")} == {"a.pt", "b.pt"}


@LIBRARYS_OWN
@pytest.mark.parametrize("name", ["", "sentence-transformers/all-nli", "optimizer"])
def test_a_callbacks_name_is_one_of_a_file_that_the_trainer_has_not(name, library, plug):
    loss = plug.ClassSoftmaxLoss(static_model(library), 10)
    with pytest.raises(ValueError, match="^name: expected a file's name, none of .*optimizer"):
        loss.checkpoints(name=name)


def _fsdp_keeps_the_class_matrix(rank, meet):
    """Where it holds the criterion too: once by itself, and in the loss."""
    import sentence_transformers as library
    from torch.distributed.fsdp import fully_shard

    from fedss_kernels.integrations.sentence_transformers import ClassSoftmaxLoss

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2)
    for outer in (lambda loss: loss.criterion, lambda loss: loss):
        loss = ClassSoftmaxLoss(static_model(library), 30, bias=True, learn_scale=True)
        alone = copy.deepcopy(loss)
        columns, labels = columns_of(loss.model, ANCHORS), torch.tensor([3, 4, 5, 3])
        fully_shard(loss.model)
        fully_shard(outer(loss))
        loss(columns, labels).backward()
        alone(columns, labels).backward()
        for mine, its in zip(loss.criterion.parameters(), alone.criterion.parameters(), strict=True):
            assert not mine._post_accumulate_grad_hooks
            torch.testing.assert_close(mine.grad.full_tensor(), its.grad)
    torch.distributed.destroy_process_group()


def test_fully_shard_of_one_process_or_of_no_parameter(library, plug, tmp_path, monkeypatch):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    calls, reshard = [], FSDPModule.reshard
    monkeypatch.setattr(FSDPModule, "reshard", lambda self: (calls.append(self), reshard(self)))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        for ignores_all in (False, True):
            loss = plug.ClassSoftmaxLoss(static_model(library), 30)
            columns, labels = columns_of(loss.model, ANCHORS), torch.tensor([3, 4, 5, 3])
            expected = loss(columns, labels)
            ignored = set(loss.model.parameters()) if ignores_all else None
            fully_shard(loss.model, ignored_params=ignored)
            calls.clear()
            for _ in range(3):
                torch.testing.assert_close(loss(columns, labels), expected)
            assert ignores_all or calls == [loss.model]  # it is asked once
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.exhaustive
def test_fully_shard_adds_up_a_class_matrix_that_it_holds(library, tmp_path):
    torch.multiprocessing.spawn(_fsdp_keeps_the_class_matrix, (tmp_path / "meet",), nprocs=2)


@LIBRARYS_OWN
def test_the_trainer_trains_in_batch(library, plug, tmp_path):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = static_model(library)
    pairs = {"anchor": [f"{a} w{i}" for i in range(4) for a in ("w30", "w31", "w32", "w33")]}
    pairs["positive"] = [f"w{10 + i}" for i in range(16)]  # nothing repeats
    other = copy.deepcopy(model)
    found = train(library, model, plug.InBatchSoftmaxLoss(model), pairs, tmp_path, 20)
    expected = train(library, other, MultipleNegativesRankingLoss(other), pairs, tmp_path, 20)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    assert found[-3:].mean() < found[:3].mean() / 2


def test_the_docstrings_examples(plug):
    assert doctest.testmod(plug).failed == 0


@LIBRARYS_OWN
def test_the_documentations_code_runs(plug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("accelerate")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
