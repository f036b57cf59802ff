"A small reasoning model with a chat template: what training and both engines make of the parameter `template: chat`."
from dataclasses import asdict

import pytest
from conftest import small
from tokenizers import AddedToken, processors

from looper_math import demonstrations, engines, models, sft
from looper_math.data import load_questions, training_rows
from looper_math.prompts import CANONICAL, build_prompt
from looper_math.trajectories import trajectory

CHAT = ("{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}")


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory):
    "Folder of the pocket base with four tokens more; both its tokenizer and its chat template write the first token."
    folder = str(tmp_path_factory.mktemp("reasoner"))
    tokenizer, model = models.load_tokenizer("data/pocket-base"), models.load_base("data/pocket-base", "float32")
    marks = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in marks])
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = CHAT
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def question():
    return load_questions("data/pocket/train.jsonl", limit=1)[0]


def chat_ids(tokenizer, question):
    "The prompt's tokens as the chat template gives them itself."
    turn = [{"role": "user", "content": f"{question['question']}\n{CANONICAL}"}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)


def test_a_training_row_is_the_templates_prompt_then_a_closed_thought_then_the_answer(reasoner, question):
    s = sft.SFTSettings(**small("01_sft", base=reasoner, template="chat", limit=1, trainer={"bf16": False}))
    rows = demonstrations.sft_rows([question], None, s.layout)
    trainer = demonstrations.make_sft_trainer(s, s.adapter, rows, s.lora_config)
    tokenizer, batch = trainer.processing_class, trainer.data_collator([trainer.train_dataset[0]])
    prompt, ids, labels = chat_ids(tokenizer, question), batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids[:len(prompt)] == prompt and ids.count(tokenizer.bos_token_id) == 1
    assert labels == [-100] * len(prompt) + ids[len(prompt):]
    learned = tokenizer.decode(ids[len(prompt):])
    assert learned.endswith(f"\n</think>\n\nAnswer: {question['gold_answer']}</s>") and learned.count("think>") == 1


def test_an_engine_gets_the_templates_tokens_and_hands_back_the_closing_tag(reasoner, question):
    tokenizer = models.load_tokenizer(reasoner)
    template = models.prompt_template(reasoner, "chat")
    request = engines.Request("q/wolfram_0", build_prompt(question["question"], template=template), max_new_tokens=20)
    job, = engines.tokenize([request], tokenizer, 500)
    assert job.ids == chat_ids(tokenizer, question)
    target = training_rows([question], models.prompt_template(reasoner, "chat"))[0]["completion"]
    tokens = tokenizer(target, add_special_tokens=False).input_ids
    done = engines.completion(request, [*tokens, tokenizer.eos_token_id], [tokenizer.eos_token_id], tokenizer)
    assert done.text == target and trajectory(request, done, question["gold_answer"])["correct"]
    thinking = tokens[:tokens.index(tokenizer.convert_tokens_to_ids("</think>"))]
    thought = engines.completion(request, thinking, [tokenizer.eos_token_id], tokenizer)
    unfinished = trajectory(request, thought, question["gold_answer"])
    assert (unfinished["answer"], unfinished["correct"], unfinished["finish_reason"]) == (None, False, "length")
    assert unfinished["reasoning"]


def test_the_word_chat_is_what_is_recorded(reasoner):
    "A run that is gone on with is compared by its parameters as they were given."
    s = sft.SFTSettings(**small("01_sft", base=reasoner, template="chat"))
    assert asdict(s)["template"] == "chat" and s.layout.startswith("<｜User｜>{question}\n{instruction}")
