"""Asks a server what users of OpenAI's own client ask, and prints what comes, as JSON lines.

python openai_client.py BASE_URL KEY MODEL ADAPTER
"""

import json
import sys

import openai

base_url, key, model, adapter = sys.argv[1:]
PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "max_tokens": 16}


def show(what: str, value: object) -> None:
    print(json.dumps([what, value]), flush=True)


with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
    show("models", [each.id for each in client.models.list()])
    show("model", client.models.retrieve(model).id)
    for name in (model, adapter):
        answer = client.completions.create(model=name, prompt=PROMPT, **GREEDY)
        show("completion", [answer.model, answer.choices[0].text, answer.usage.completion_tokens])
    stream = client.completions.create(
        model=model, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    show("stream", "".join(c.choices[0].text for c in chunks if c.choices))
    show("usage", chunks[-1].usage.completion_tokens)
    messages = [{"role": "user", "content": "Hello!"}]
    answer = client.chat.completions.create(
        model=model, messages=messages, logprobs=True, top_logprobs=2, **GREEDY
    )
    show("chat", [answer.choices[0].message.role, len(answer.choices[0].logprobs.content) > 0])
    streamed = client.chat.completions.create(
        model=model, messages=messages, stream=True, **GREEDY
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    show("same", text == answer.choices[0].message.content)
    response = client.responses.create(model=model, input="Hello!", max_output_tokens=8)
    show("response", response.status in ("completed", "incomplete"))
    for wrong in ({"model": "another"}, {"prompt": "x " * 5000}, {"temperature": -1}):
        try:
            client.completions.create(**{"model": model, "prompt": PROMPT, **GREEDY, **wrong})
        except openai.APIStatusError as error:
            show("refused", [error.status_code, type(error).__name__])
    try:
        client.embeddings.create(model=model, input="x")
    except openai.APIStatusError as error:
        show("refused", [error.status_code, type(error).__name__])

with openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client:
    try:
        client.models.list()
    except openai.APIStatusError as error:
        show("refused", [error.status_code, type(error).__name__])
