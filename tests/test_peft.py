"""Masks on the ranks of PEFT's own LoRA layers."""

import numpy as np
import pytest
import torch

import tiny
import turnover
from turnover import InputError

peft = pytest.importorskip("peft", reason="pip install 'turnover[text]'")
transformers = pytest.importorskip("transformers", reason="pip install 'turnover[text]'")

from turnover.integrations.pretrained import load_masks, save_masks  # noqa: E402

IDS = [3, 2**40, 17, 0]
QUERY = "bert.encoder.layer.0.attention.self.query"


def base():
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=tiny.CLASSES,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        model.classifier = turnover.WideHead(16, 48, tiny.CLASSES)
    return model


def lora(**more):
    return peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.0, **more)


def adapted(**more):
    return tiny.randomise(peft.get_peft_model(base(), lora(**more)))


def masked(model, network, side="exposed"):
    with torch.no_grad(), getattr(network, side)(IDS):
        return model.eval()(**tiny.texts(4)).logits


def test_names_of_sites_do_not_tell_that_a_model_is_wrapped():
    bare = base()
    peft.inject_adapter_in_model(lora(), bare)
    wrapped = adapted()
    assert turnover.attach(wrapped, "lora").sites == turnover.attach(bare, "lora").sites
    assert f"{QUERY}.lora_A.default" in turnover.attach(adapted(), "lora").sites


def test_a_masked_rank_gets_no_gradient_from_its_instance():
    model = adapted()
    network = turnover.attach(model, "lora")
    model.train()
    with network.exposed([7] * 4):
        model(**tiny.texts(4), labels=tiny.labels(4)).loss.backward()
    spec = network.spec
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            site = turnover.dropout.sites.canonical_name(name).removesuffix(".weight")
            kept = spec.exposed([7], site, 4)[0]
            reached = parameter.grad.abs().sum(dim=1) > 0
            assert torch.equal(reached, kept), name


def test_each_adapter_has_masks_of_its_own_and_the_active_one_is_masked():
    model = adapted()
    model.add_adapter("other", lora())
    model.set_adapter("other")
    tiny.randomise(model, seed=1)
    model.set_adapter("default")
    network = turnover.attach(model, "lora")
    assert len(network.sites) == 8
    assert {f"{QUERY}.lora_A.default", f"{QUERY}.lora_A.other"} < set(network.sites)
    of_default = masked(model, network)
    model.set_adapter("other")
    of_other = masked(model, network)
    network.detach()
    for adapter, expected in (("default", of_default), ("other", of_other)):
        model.set_adapter(adapter)
        alone = turnover.attach(model, f"*.lora_A.{adapter}")
        torch.testing.assert_close(masked(model, alone), expected)
        alone.detach()


def test_adapters_that_do_not_run_add_nothing_to_scores():
    model = adapted()
    model.add_adapter("other", lora())
    network = turnover.attach(model, "lora")
    targets, ids = [(tiny.texts(3), tiny.labels(3))], torch.arange(5)
    for method in ("linear", "exact"):
        both = turnover.Influence(network, method=method).estimate(targets, ids)
        active = turnover.Influence(network, method=method, sites=["*.default"])
        np.testing.assert_allclose(
            both.scores, active.estimate(targets, ids).scores, rtol=1e-4, atol=1e-6
        )


def test_an_adapter_that_comes_after_the_masks_leaks_and_the_audit_says_so():
    model = adapted()
    network = turnover.attach(model, "lora")
    assert network.audit(tiny.texts(4)).clean
    model.add_adapter("late", lora())
    model.set_adapter("late")
    report = network.audit(tiny.texts(4))
    assert f"{QUERY}.lora_A.late.weight" in str(report)
    assert report.leaking_share > 0.9


def test_merged_weights_are_refused_with_the_reason():
    model = adapted()
    model.merge_adapter()
    for sites in ("lora", f"{QUERY}.lora_A.default"):
        with pytest.raises(InputError, match=r"lora_A.*merged.*unmerge_adapter\(\)"):
            turnover.attach(model, sites)
    model.unmerge_adapter()
    network = turnover.attach(model, ["lora", "head"])
    before = masked(model, network)
    model.merge_adapter()
    for side in ("exposed", "hidden"):
        with pytest.raises(InputError, match="merged"):
            masked(model, network, side)
    targets, ids = [(tiny.texts(3), tiny.labels(3))], torch.arange(5)
    with pytest.raises(InputError, match="merged"):
        turnover.Influence(network).estimate(targets, ids)
    # The whole network has no masks, and the head's do not depend on what the encoder is made of.
    with torch.no_grad(), network.mean():
        model.eval()(**tiny.texts(4))
    turnover.Influence(network, sites=["classifier.*"]).estimate(targets, ids)
    model.unmerge_adapter()
    torch.testing.assert_close(masked(model, network), before, rtol=1e-4, atol=1e-5)


def test_of_a_module_to_save_the_copy_that_is_trained_is_masked():
    model = adapted(modules_to_save=["classifier"])
    network = turnover.attach(model, ["lora", "head"])
    assert [site for site in network.sites if "classifier" in site] == [
        "classifier.modules_to_save.default.activation"
    ]
    assert network.audit(tiny.texts(4)).clean
    network.detach()
    with pytest.raises(InputError, match="unknown site"):
        turnover.attach(model, "classifier.original_module.activation")


def test_masks_come_back_with_an_adapter_from_pretrained(tmp_path):
    model = adapted(modules_to_save=["classifier"])
    network = turnover.attach(model, ["lora", "head"])
    expected = masked(model, network)
    model.save_pretrained(tmp_path)
    save_masks(network, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    again = load_masks(loaded, tmp_path)
    assert again.fingerprint() == network.fingerprint()
    torch.testing.assert_close(masked(loaded, again), expected)
    renamed = peft.PeftModel.from_pretrained(base(), tmp_path, adapter_name="mine")
    with pytest.raises(InputError, match=r"lora_A\.default.*lora_A\.mine"):
        load_masks(renamed, tmp_path)


def test_the_trainer_trains_saves_and_resumes_an_adapter(tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install 'turnover[text]'")
    from turnover.integrations.trainer import attach_trainer

    batch = tiny.texts(8)
    table = {name: value.tolist() for name, value in batch.items()}
    dataset = datasets.Dataset.from_dict({**table, "label": tiny.labels(8).tolist()})

    def trainer(folder, **settings):
        arguments = transformers.TrainingArguments(
            str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            save_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **settings,
        )
        model = adapted(modules_to_save=["classifier"])
        return transformers.Trainer(model, arguments, train_dataset=dataset)

    def trained(one):
        return {n: p for n, p in one.model.named_parameters() if p.requires_grad}

    whole = trainer(tmp_path / "whole", gradient_checkpointing=True)
    network = attach_trainer(whole, ["lora", "head"])
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    attach_trainer(resumed, ["lora", "head"])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in trained(resumed).items():
        torch.testing.assert_close(value, trained(whole)[name], msg=lambda m, n=name: f"{n}: {m}")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "whole" / "checkpoint-6")
    again = load_masks(loaded, tmp_path / "whole" / "checkpoint-6")
    torch.testing.assert_close(masked(loaded, again), masked(whole.model, network))


def adapter(kind, **options):
    return peft.get_peft_model(base(), getattr(peft, kind)(target_modules=["query"], **options))


@pytest.mark.parametrize("sites", ["lora", f"{QUERY}.lora_A.default"])
def test_dora_is_refused_by_name(sites):
    model = adapter("LoraConfig", r=4, use_dora=True)
    with pytest.raises(InputError, match=r"DoRA.*not supported.*leave use_dora=True out"):
        turnover.attach(model, sites)


def test_what_dora_leaks_under_a_masked_head_the_audit_names():
    model = adapter("LoraConfig", r=4, use_dora=True)
    tiny.randomise(model)
    model.base_model.model.classifier.requires_grad_(True)
    report = turnover.attach(model, "head").audit(tiny.texts(4))
    leaks = {p.name for p in report.parameters if p.leaking}
    assert any("lora_magnitude_vector" in name for name in leaks)


def test_a_dora_adapter_that_is_made_the_active_one_later_is_refused():
    model = adapted()
    model.add_adapter("other", lora(use_dora=True))
    network = turnover.attach(model, "lora")
    masked(model, network)
    model.set_adapter("other")
    with pytest.raises(InputError, match=r"lora_A.other.*DoRA"):
        masked(model, network)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("IA3Config", "IA3", {"feedforward_modules": []}),
        ("VeraConfig", "VeRA", {"r": 4}),
        (
            "AdaLoraConfig",
            "AdaLoRA",
            {"init_r": 4, "target_r": 2, "total_step": 9, "tinit": 1, "tfinal": 1},
        ),
        ("LoHaConfig", "LoHa", {"r": 4}),
        ("LoKrConfig", "LoKr", {"r": 4}),
        ("OFTConfig", "OFT", {"oft_block_size": 4}),
    ],
)
def test_adapters_without_rank_components_are_named(kind, name, options):
    model = adapter(kind, **options)
    with pytest.raises(InputError, match=rf"'lora'.*adapter is {name},.*peft.LoraConfig"):
        turnover.attach(model, "lora")
    turnover.attach(model, "head")


def test_lora_of_an_embedding_or_within_a_weight_is_refused():
    embedding = peft.LoraConfig(r=4, target_modules=["word_embeddings"])
    with pytest.raises(InputError, match=r"LoRA of an embedding or a parameter"):
        turnover.attach(peft.get_peft_model(base(), embedding), "lora")

    class Attending(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0][:, 0]

    model = peft.get_peft_model(Attending(), peft.LoraConfig(r=4, target_modules=["attention"]))
    with pytest.raises(InputError, match=r"would never run.*MultiheadAttention"):
        turnover.attach(model, "lora")


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_kinds_of_lora_that_run_their_ranks_on_rows_are_masked(options):
    model = adapter("LoraConfig", r=4, lora_dropout=0.0, **options)
    tiny.randomise(model)
    network = turnover.attach(model, "lora")
    report = network.audit(tiny.texts(4))
    assert not any(p.leaking for p in report.parameters if p.name.endswith("lora_A.default.weight"))
