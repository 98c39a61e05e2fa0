"""Causal language models trained without logits, with the real library; tiny ones, made offline."""

import copy
import doctest
import functools
import io
import re
import types
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs" / "transformers.md"
C = 300
SIZES = dict(
    vocab_size=C, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture
def plug(transformers):
    from fedss_kernels.integrations import transformers as plug

    return plug


@pytest.fixture
def llama(transformers):
    def make(**changes):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | changes))).train()

    return make


def tokens(rows=4, length=8, first=0):
    generator = torch.Generator().manual_seed(first)
    ids = torch.randint(C, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    return ids, labels


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model, attached, **inputs):
    loss, expected = gradients(model, **inputs)
    got, found = gradients(attached, **inputs)
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys() and len(found) > 3
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["mean", "num_items_in_batch", "shift_labels"])
def test_on_all_classes_loss_and_gradients_are_the_models_own(llama, plug, tied, how):
    model = llama(tie_word_embeddings=tied)
    ids, labels = tokens()
    inputs = {"input_ids": ids, "labels": labels}
    if how == "num_items_in_batch":
        inputs["num_items_in_batch"] = torch.tensor(50)
    if how == "shift_labels":
        inputs["shift_labels"] = labels.flip(0).contiguous()
    attached = plug.attach(copy.deepcopy(model))
    assert attached(**inputs).logits is None  # the loss was not made of logits
    assert_same_training(model, attached, **inputs)


@pytest.mark.parametrize("name", ["GPT2", "Phi", "Mixtral"])
def test_other_architectures_too(transformers, plug, name):
    """GPT2 gives its arguments by position, Phi's head has a bias, Mixtral adds a loss of its router."""
    sizes = {k: v for k, v in SIZES.items() if name != "GPT2"} or dict(
        vocab_size=C, n_embd=16, n_layer=1, n_head=2, n_positions=64
    )
    more = {"num_local_experts": 2, "output_router_logits": True} if name == "Mixtral" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    for probability in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, probability, 0.0)
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
        config
    ).train()
    ids, labels = tokens()
    assert_same_training(model, plug.attach(copy.deepcopy(model)), input_ids=ids, labels=labels)


def test_the_sampled_loss_is_an_estimate_of_the_models_own(llama, plug):
    model = llama()
    model.lm_head.weight.data.mul_(20)
    ids, labels = tokens(2, 8)
    expected = float(model(input_ids=ids, labels=labels).loss.detach())
    plug.attach(model, num_sampled=100, generator=torch.Generator().manual_seed(0))
    found = torch.stack([model(input_ids=ids, labels=labels).loss.detach() for _ in range(200)])
    assert found.std() > 0 and abs(float(found.mean()) - expected) < 0.02 * expected


def test_a_class_that_takes_no_part_has_no_gradient(llama, plug):
    model = plug.attach(llama(tie_word_embeddings=False), num_sampled=10)
    ids, labels = tokens(2, 4)
    _, found = gradients(model, input_ids=ids, labels=labels)
    held = found["lm_head.weight"].abs().sum(1) > 0
    assert held[labels[1, 1:]].all() and held.sum() <= 10 + labels.numel()


def test_labels_and_negatives_as_many_as_the_classes_are_the_full_softmax(llama, plug):
    model = llama()
    ids, labels = tokens(40, 8)  # 320 labels, of 300 classes
    assert_same_training(
        model, plug.attach(copy.deepcopy(model), num_sampled=10), input_ids=ids, labels=labels
    )


def test_without_labels_and_in_eval_mode_nothing_changes(llama, plug):
    model = llama()
    attached = plug.attach(copy.deepcopy(model), num_sampled=10)
    ids, labels = tokens()
    assert torch.equal(attached(input_ids=ids).logits, model(input_ids=ids).logits)  # in training mode
    model.eval(), attached.eval()
    expected, found = model(input_ids=ids, labels=labels), attached(input_ids=ids, labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(attached.generate(ids, **options), model.generate(ids, **options))


def test_tuples_have_the_loss_first_and_no_hidden_states_for_logits(llama, plug):
    ids, labels = tokens()
    outputs = plug.attach(llama())(input_ids=ids, labels=labels, return_dict=False)
    assert isinstance(outputs, tuple) and outputs[0].dim() == 0 and outputs[1] is None
    assert plug.attach(llama())(input_ids=ids, labels=labels, return_dict=None).logits is None


def test_detached_the_model_is_of_its_own_class_and_gives_logits(llama, plug):
    model = llama()
    own = type(model)
    ids, labels = tokens()
    expected = model(input_ids=ids, labels=labels)
    plug.attach(model, 10)(input_ids=ids, labels=labels)
    assert plug.detach(model) is model
    assert (
        type(model) is own
        and type(model.lm_head) is torch.nn.Linear
        and not hasattr(model, "_fedss_settings")
    )
    found = model(input_ids=ids, labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert not {"passes", "passed"} & vars(model.lm_head).keys()
    with pytest.raises(TypeError, match="expected one that attach"):
        plug.detach(model)


def test_parameters_and_what_is_saved_are_the_same(llama, plug, transformers, tmp_path):
    model = llama(tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    model.save_pretrained(tmp_path / "before")
    plug.attach(model, 10)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes(), path.name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert type(again) is transformers.LlamaForCausalLM
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_copies_and_pickles_stay_attached(llama, plug):
    model = plug.attach(llama(), 10, generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        ids, labels = tokens(2, 4)
        assert again(input_ids=ids, labels=labels).logits is None
        assert type(plug.detach(again)).__name__ == "LlamaForCausalLM"


def test_a_resized_vocabulary_trains_on(llama, plug):
    model = plug.attach(llama(tie_word_embeddings=True))
    model.resize_token_embeddings(C + 20, mean_resizing=False)
    own = plug.detach(copy.deepcopy(model))
    ids, labels = tokens()
    labels[1, 2] = C + 10
    assert model(input_ids=ids, labels=labels).logits is None
    assert_same_training(own, model, input_ids=ids, labels=labels)


@pytest.mark.parametrize("number", [None, 0, torch.tensor(0), torch.tensor([0])], ids=str)
def test_where_every_label_is_ignored_the_loss_is_zero(llama, plug, number):
    """And so it is by the Trainer's count of the labels."""
    (ids, labels), model = tokens(), plug.attach(llama(), 10)
    given = {"labels": torch.full_like(labels, -100), "num_items_in_batch": number}
    loss, found = gradients(model, input_ids=ids, **given)
    assert loss == 0 and not any(g.any() for g in found.values())


def test_bfloat16_and_autocast(llama, plug):
    ids, labels = tokens()
    model = plug.attach(llama())
    expected = model(input_ids=ids, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(model(input_ids=ids, labels=labels).loss - expected) < 0.02
    assert abs(model.to(torch.bfloat16)(input_ids=ids, labels=labels).loss - expected) < 0.02


def test_only_what_asks_for_a_gradient_has_one(llama, plug):
    model = plug.attach(llama(tie_word_embeddings=False), 10)
    model.lm_head.requires_grad_(False)
    ids, labels = tokens()
    _, found = gradients(model, input_ids=ids, labels=labels)
    assert "lm_head.weight" not in found and found["model.embed_tokens.weight"].any()


def test_models_that_do_not_fit_are_refused_in_words(transformers, llama, plug):
    T = transformers
    t5 = T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=C, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    bert = T.BertForMaskedLM(T.BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}))
    no_linear = llama()
    no_linear.lm_head = torch.nn.Sequential(no_linear.lm_head)
    for model, error, words in [
        (torch.nn.Linear(2, 2), TypeError, "expected a causal language model of transformers, got Linear"),
        (t5, TypeError, "got T5ForConditionalGeneration, whose T5ForConditionalGeneration.forward does not"),
        (bert, ValueError, "is ForCausalLMLoss, got BertForMaskedLM with ForMaskedLMLoss"),
        (no_linear, TypeError, "head that is an nn.Linear, got a torch.nn.modules.container.Sequential"),
    ]:
        before = type(model)
        with pytest.raises(error, match=re.escape(words)):
            plug.attach(model)
        assert type(model) is before
    for wrong in ({"num_sampled": -1}, {"impl": "fast"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            plug.attach(llama(), **wrong)


def test_a_model_that_caps_its_logits_is_refused_and_left_as_it_was(transformers, plug):
    config = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)
    model = plug.attach(transformers.Gemma2ForCausalLM(config).train())
    ids, labels = tokens()
    with pytest.raises(RuntimeError, match="soft caps"):
        model(input_ids=ids, labels=labels)
    assert model(input_ids=ids).logits.shape == (4, 8, C)


@pytest.fixture
def accelerator(transformers):
    """In mixed precision. It is one for the process, so that a Trainer's is undone before, and it after."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def set_forward(model, how, accelerator, own_forward):
    """A forward on the model itself, as others set it."""
    if how == "prepared":
        return accelerator.prepare(model)
    if how == "prepared and unwrapped":  # down to the model's own forward, past attach's
        return accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    if how == "hooks":
        from accelerate.hooks import ModelHook, add_hook_to_module

        return add_hook_to_module(model, ModelHook())
    model.forward = types.MethodType(own_forward, model)
    return model


@pytest.mark.parametrize("how", ["prepared", "prepared and unwrapped", "hooks", "patched"])
@pytest.mark.parametrize("first", ["attached", "set"])
def test_a_forward_set_on_the_model_itself_is_called_with_the_rest(llama, plug, accelerator, how, first):
    ids, labels = tokens()
    model = llama()
    own_forward = type(model).forward
    expected = float(model(input_ids=ids, labels=labels).loss.detach())
    attached = plug.attach(model) if first == "attached" else model
    attached = plug.attach(set_forward(attached, how, accelerator, own_forward))
    outputs = attached(input_ids=ids, labels=labels)
    assert outputs.logits is None and abs(float(outputs.loss.detach()) - expected) < 0.02
    assert attached(input_ids=ids).logits.shape == (4, 8, C)
    assert "forward" in vars(plug.detach(attached))
    outputs = attached(input_ids=ids, labels=labels)
    assert outputs.logits.shape == (4, 8, C) and abs(float(outputs.loss.detach()) - expected) < 0.02


def test_what_is_set_in_mixed_precision_is_put_back_and_may_be_set_again(llama, plug, accelerator):
    model = accelerator.prepare(llama())
    before = {name: vars(model)[name] for name in ("forward", "_original_forward")}
    plug.detach(plug.attach(plug.attach(model, 10)))
    assert {name: vars(model)[name] for name in before} == before and not hasattr(model, "_fedss_passed_by")
    ids, labels = tokens()
    again = accelerator.prepare(plug.attach(model))
    for each in (again, copy.deepcopy(again)):
        outputs = each.forward(input_ids=ids, labels=labels)
        assert outputs.logits is None and outputs.loss.dtype == torch.float32
        assert plug.detach(each)(input_ids=ids).logits.shape == (4, 8, C)
        assert plug.attach(each)(input_ids=ids, labels=labels).logits is None


def with_z_loss(outputs):
    outputs.loss = outputs.loss + outputs.logits.float().logsumexp(-1).square().mean()
    return outputs


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_of_ones_own_is_set_after_and_never_meets_hidden_states(llama, plug, wrapped):
    model, (ids, labels) = llama(), tokens()
    before = model.forward

    def z_loss(inner):
        def forward(*args, **kwargs):
            return with_z_loss(inner(*args, **kwargs))

        return functools.wraps(inner)(forward) if wrapped else forward

    model.forward = z_loss(before)
    expected = model(input_ids=ids, labels=labels).loss
    with pytest.raises(TypeError, match=r"expected no forward set on it but accelerate's or torch's"):
        plug.attach(model)
    assert torch.equal(model(input_ids=ids, labels=labels).loss, expected)
    del model.forward
    attached = plug.attach(model)
    inner = attached.forward
    attached.forward = lambda batch: inner(**batch)
    assert plug.attach(attached)({"input_ids": ids, "labels": labels}).logits is None
    attached.forward = z_loss(inner)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'float'"):
        attached(input_ids=ids, labels=labels)
    attached.forward = z_loss(before)
    with pytest.raises(RuntimeError, match="which calls its class's past it; del model.forward"):
        attached(input_ids=ids, labels=labels)
    del attached.forward
    assert attached(input_ids=ids, labels=labels).logits is None


def test_hooks_meet_no_hidden_states(llama, plug, accelerator):
    """torch's, beside a forward of accelerate's; one of one's own among accelerate's is refused."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, (ids, labels) = accelerator.prepare(llama()), tokens()
    plug.attach(model).register_forward_hook(lambda module, args, outputs: with_z_loss(outputs))
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'float'"):
        model(input_ids=ids, labels=labels)

    class ZLoss(hooks.ModelHook):
        def post_forward(self, module, output):
            return with_z_loss(output)

    for hook in (ZLoss(), hooks.SequentialHook(hooks.ModelHook(), ZLoss())):
        with pytest.raises(TypeError, match="expected no forward set on it but"):
            plug.attach(hooks.add_hook_to_module(llama(), hook))
    attached = hooks.add_hook_to_module(plug.attach(llama()), ZLoss())
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'float'"):
        attached(input_ids=ids, labels=labels)


def test_a_forward_that_does_not_take_its_loss_from_the_head_is_refused(transformers, llama, plug):
    class TakesNone(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, own=False, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            loss = self.loss_function(logits, labels, self.vocab_size) if own else logits.square().mean()
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss, logits)

    class TakesTwo(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            loss = self.loss_function(logits, labels, self.vocab_size)
            loss = loss + self.loss_function(logits[:1], labels[:1], self.vocab_size)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss, logits)

    model, (ids, labels) = llama(), tokens()
    for own, words in [(TakesNone, "one that does not"), (TakesTwo, "one that does so again")]:
        each = copy.deepcopy(model)
        each.__class__ = own
        with pytest.raises(RuntimeError, match=f"expected a forward that calls self.loss_function.* {words}"):
            plug.attach(each)(input_ids=ids, labels=labels)
        assert not each.lm_head.passes
    plug.attach(model).lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.t()
    with pytest.raises(RuntimeError, match=r"expected a forward that calls its head"):
        model(input_ids=ids, labels=labels)


def test_a_head_with_hooks_is_refused_and_may_get_them_after(llama, plug):
    hooks = pytest.importorskip("accelerate.hooks")
    ids, labels = tokens()
    model = llama()
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    before = type(model)
    with pytest.raises(TypeError, match=r"remove_hook_from_module\(head\)"):
        plug.attach(model)
    assert type(model) is before and not hasattr(model, "_fedss_settings")
    hooks.remove_hook_from_module(model.lm_head)
    assert plug.attach(model)(input_ids=ids, labels=labels).logits is None
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    assert model(input_ids=ids, labels=labels).logits is None
    assert plug.attach(model, 10)(input_ids=ids, labels=labels).logits is None
    assert plug.detach(model)(input_ids=ids, labels=labels).logits.shape == (4, 8, C)


def test_other_models_of_an_attached_ones_class_are_not_attached(llama, plug, tmp_path):
    model = plug.attach(llama(), 10)
    model.save_pretrained(tmp_path)
    ids, labels = tokens()
    expected = plug.detach(copy.deepcopy(model))(input_ids=ids, labels=labels)
    again = type(model).from_pretrained(tmp_path).train()
    for other in (again, type(model)(model.config).train()):
        assert other(input_ids=ids, labels=labels).logits.shape == (4, 8, C)
    assert torch.equal(again(input_ids=ids, labels=labels).loss, expected.loss)
    assert type(plug.detach(copy.deepcopy(again))) is type(plug.detach(model))
    assert plug.attach(again, 10)(input_ids=ids, labels=labels).logits is None


def test_a_forward_may_call_its_bases(transformers, llama, plug):
    class Passes(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Doubles(Passes):
        def forward(self, labels=None, input_ids=None, **kwargs):
            outputs = super().forward(input_ids, labels=labels, **kwargs)
            outputs.loss *= 2
            return outputs

    model = llama()
    ids, labels = tokens()
    for own in (Passes, Doubles):
        model.__class__ = own
        attached = plug.attach(copy.deepcopy(model))
        assert_same_training(model, attached, input_ids=ids, labels=labels)
        in_order = (labels, ids) if own is Doubles else (ids, None, None, None, None, labels)
        outputs = attached(*in_order)
        assert outputs.logits is None
        torch.testing.assert_close(outputs.loss, model(*in_order).loss)
        assert type(plug.detach(attached)) is own


def test_a_class_that_reads_its_bases_logits_meets_none(transformers, llama, plug):
    class Base(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            if self.training:
                outputs.loss = outputs.loss + self.of(outputs).float().square().mean()
            return outputs

    reads = [
        lambda outputs: outputs.logits,
        lambda outputs: outputs["logits"],
        lambda outputs: outputs[1],
        lambda outputs: outputs.to_tuple()[1],
        lambda outputs: getattr(outputs, "log" + "its"),
    ]
    ids, labels = tokens()
    for read in reads:
        model = llama()
        model.__class__ = type("Reads", (Base,), {"of": staticmethod(read)})
        assert model(input_ids=ids, labels=labels).loss.isfinite()
        plug.attach(model)
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'float'"):
            model(input_ids=ids, labels=labels)
        assert model.eval()(input_ids=ids, labels=labels).logits.shape == (4, 8, C)


class Rows(torch.utils.data.Dataset):
    """Sentences that can be learned: each token is its predecessor plus a step."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = (torch.arange(8 + i % 3) * (i % 4 + 1) + i) % C
        pad = 10 - len(ids)
        labels = torch.cat([ids, ids.new_full((pad,), -100)])
        return {"input_ids": torch.cat([ids, ids.new_zeros(pad)]), "labels": labels}


def train(transformers, model, folder, steps=6, **options):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        seed=1, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        **{"save_strategy": "no"} | options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    return trainer


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_the_trainer_trains_on_all_classes_as_the_model_alone_does(transformers, llama, plug, tmp_path):
    """With labels of -100 in unequal number over accumulated batches, and clipped gradients."""
    model = llama(tie_word_embeddings=True)
    attached = plug.attach(copy.deepcopy(model))
    expected, found = (losses(train(transformers, each, tmp_path)) for each in (model, attached))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for (name, theirs), ours in zip(model.named_parameters(), attached.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3, msg=name)


def test_the_trainer_learns_from_samples_and_evaluates_on_all(transformers, llama, plug, tmp_path):
    trainer = train(
        transformers, plug.attach(llama(), 64), tmp_path, 25, save_strategy="steps", save_steps=20
    )
    found = losses(trainer)
    assert found[-3:].mean() < found[:3].mean() - 1
    results = trainer.evaluate()
    own = plug.detach(trainer.model).eval()
    assert results["eval_loss"] < found[0] and trainer.predict(Rows()).predictions.shape == (32, 10, C)
    assert (tmp_path / "checkpoint-20" / "model.safetensors").exists() and type(
        own
    ).__name__ == "LlamaForCausalLM"


def test_a_trainer_that_smooths_labels_has_logits(transformers, llama, plug, tmp_path):
    model = llama()
    attached = plug.attach(copy.deepcopy(model), 64)
    expected, found = (
        losses(train(transformers, each, tmp_path, 2, label_smoothing_factor=0.1))
        for each in (model, attached)
    )
    assert torch.equal(found, expected)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("default")  # torch.compile's own
def test_compiled_training_is_what_it_is_in_eager_mode_and_one_graph(llama, plug):
    model = plug.attach(llama())
    ids, labels = tokens()
    loss, expected = gradients(model, input_ids=ids, labels=labels)
    got, found = gradients(torch.compile(model, fullgraph=True), input_ids=ids, labels=labels)
    torch.testing.assert_close(got, loss)
    for name in expected:
        torch.testing.assert_close(found[f"_orig_mod.{name}"], expected[name], rtol=1e-4, atol=1e-6)


def test_the_docstrings_example(plug):
    torch.manual_seed(0)
    assert doctest.testmod(plug).failed == 0


def test_the_documentations_code_runs(plug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("accelerate")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
