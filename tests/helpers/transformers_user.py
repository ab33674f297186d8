"""A program: what users of transformers, accelerate and peft do with an export, in the versions at hand.

python transformers_user.py FOLDER OUT; OUT gets the folder saved again, and a merged LoRA below it.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

TEXTS = ["the model reads noisy tokens", "the"]
FIFTH = int(transformers.__version__.split(".")[0]) >= 5
DTYPE = "dtype" if FIFTH else "torch_dtype"


def main(folder, out):
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    auto = AutoModelForCausalLM if config["causal"] and config["family"] == "ar" else AutoModelForMaskedLM
    model = load(auto, folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"] and int(batch.attention_mask[1, 0]) == 0
    the_tokenizer_fits(tokenizer, config)
    loading_arguments(auto, folder, batch)
    logits = model(**batch).logits.detach()
    if auto is AutoModelForCausalLM:
        causal_generation(model, tokenizer, batch, folder)
    else:
        diffusion_generation(model, tokenizer, batch)
    compiled(model, batch, logits)
    saved_again(auto, model, tokenizer, batch, logits, out / "again")
    resized(model, tokenizer)
    if installed("accelerate") and installed("peft"):
        trained(auto, folder, tokenizer)
        spread(auto, folder, batch, logits)
        adapted(auto, folder, tokenizer, batch, out / "merged")
    print(f"transformers {transformers.__version__}: {config['family']}: all as expected")


def installed(name):
    try:
        __import__(name)
    except ImportError:
        print(f"without {name}")
        return False
    return True


def load(auto, folder, **arguments):
    return auto.from_pretrained(folder, trust_remote_code=True, **arguments).eval()


def the_tokenizer_fits(tokenizer, config):
    assert len(tokenizer) == config["vocab_size"]
    for name in ("mask", "eos", "bos", "pad"):
        found = getattr(tokenizer, f"{name}_token_id")
        assert found == config[f"{name}_token_id"] and 0 <= found < config["vocab_size"], name
    ids = tokenizer(f"the {tokenizer.mask_token} model")["input_ids"]
    assert ids.count(config["mask_token_id"]) == 1


def loading_arguments(auto, folder, batch):
    assert load(auto, folder, **{DTYPE: "auto"}).dtype == torch.float32
    half = load(auto, folder, **{DTYPE: torch.bfloat16})
    assert half.dtype == torch.bfloat16 and torch.isfinite(half(**batch).logits).any()
    plain, eager = (
        load(auto, folder, **arguments)(**batch).logits
        for arguments in ({}, {"attn_implementation": "eager"})
    )
    real = batch.attention_mask.bool()
    torch.testing.assert_close(eager[real], plain[real], rtol=1e-4, atol=1e-4)


def causal_generation(model, tokenizer, batch, folder):
    width, greedy = batch.input_ids.shape[1], {"max_new_tokens": 8, "do_sample": False}
    made = model.generate(**batch, **greedy)
    assert made.shape[0] == 2 and torch.equal(made[:, :width], batch.input_ids)
    assert torch.equal(made, model.generate(**batch, **greedy, use_cache=False))
    own = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    for row, text in enumerate(TEXTS):
        prompt = tokenizer(text, return_tensors="pt")
        alone = model.generate(**prompt, **greedy)[0, prompt.input_ids.shape[1] :]
        assert alone.tolist() == made[row, width : width + len(alone)].tolist()
        # By this package's sampler and cache, which does not stop at <eos> by itself.
        ours = own.generate(prompt.input_ids, **greedy)[0, prompt.input_ids.shape[1] :]
        assert alone.tolist() == ours[: len(alone)].tolist()
    drawn = {"max_new_tokens": 8, "do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8}
    several = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        several.append(model.generate(**batch, **drawn, num_return_sequences=3))
    assert several[0].shape[0] == 6 and torch.equal(several[0], several[1])
    assert several[0].tolist() != several[2].tolist()
    assert model.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False).shape[0] == 2
    ended = int(made[0, width])
    stopped = model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **greedy, eos_token_id=ended)
    assert stopped.shape[1] == width + 1 and int(stopped[0, -1]) == ended
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), **greedy, streamer=streamer)
    assert len(list(streamer)) > 1
    (said,) = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)(TEXTS[0], **greedy)
    assert said["generated_text"].startswith(TEXTS[0])
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    logits = model(**batch).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)


def diffusion_generation(model, tokenizer, batch):
    width, several = batch.input_ids.shape[1], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        several.append(model.generate(**batch, max_new_tokens=8, num_return_sequences=2))
    assert several[0].shape == (4, width + 8) and torch.equal(several[0], several[1])
    assert several[0].tolist() != several[2].tolist()
    assert torch.equal(several[0][::2, :width], batch.input_ids)
    filler = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    assert len(filler(f"the {tokenizer.mask_token} reads")) == 5


def compiled(model, batch, logits):
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**batch).logits
    torch.testing.assert_close(found, logits)


def uploaded(model, out):
    """Names of the files that are there when transformers uploads; nothing leaves this machine."""
    from transformers.utils.hub import PushToHubMixin

    original, found = PushToHubMixin._upload_modified_files, set()
    PushToHubMixin._upload_modified_files = lambda self, folder, *words: found.update(Path(folder).iterdir())
    try:
        transformers.PreTrainedModel.save_pretrained(model, out)
        model._upload_modified_files(out, "someone/model", {})
    finally:
        PushToHubMixin._upload_modified_files = original
    return {path.name for path in found}


def saved_again(auto, model, tokenizer, batch, logits, out):
    files = {"megatron_dlm_run.json", "export_report.json", "check.json", "modeling_megatron_dlm.py"}
    assert files <= uploaded(model, out.parent / "uploaded")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    names = {path.name for path in out.iterdir()}
    assert {"modeling_megatron_dlm.py", "verify_megatron_dlm.py", "megatron_dlm_run.json"} <= names
    assert json.loads((out / "export_report.json").read_text())["saved_again"] is True
    assert torch.equal(load(auto, out)(**batch).logits, logits)
    assert torch.equal(load(AutoModel, out)(**batch).logits, logits)


def resized(model, tokenizer):
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(len(tokenizer) + 3)
    ids = torch.tensor([[len(tokenizer) + 2]])
    assert larger(ids).logits.shape[-1] == len(tokenizer) + 3


class Sentences(torch.utils.data.Dataset):
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.tokenizer("the model reads noisy tokens and predicts"[: 20 + 2 * index])


def trained(auto, folder, tokenizer):
    model = load(auto, folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            out,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to=[],
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=Sentences(tokenizer),
            eval_dataset=Sentences(tokenizer),
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        assert 0 < trainer.train().training_loss < 100
        assert 0 < trainer.evaluate()["eval_loss"] < 100
        trainer.save_model(f"{out}/model")
        load(auto, f"{out}/model")
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def spread(auto, folder, batch, logits):
    parts = {"vocab_embed": "cpu", "sigma_map": "cpu", "blocks.0": "cpu", "blocks.1": "disk"}
    for device_map in ({"": "cpu"}, parts | {"output_layer": "disk"}):
        with tempfile.TemporaryDirectory() as offload, torch.no_grad():
            model = load(auto, folder, device_map=device_map, offload_folder=offload)
            torch.testing.assert_close(model(**batch).logits, logits)
            model.generate(**batch, max_new_tokens=2)


def adapted(auto, folder, tokenizer, batch, out):
    import peft

    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for task_type in (None, "CAUSAL_LM"):
        lora = peft.LoraConfig(task_type=task_type, target_modules=["attn_qkv", "attn_out"], r=2)
        model = peft.get_peft_model(load(auto, folder), lora).train()
        model(**batch, labels=labels).loss.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        model.eval().generate(**batch, max_new_tokens=2)
    merged = model.merge_and_unload()
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    load(auto, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
