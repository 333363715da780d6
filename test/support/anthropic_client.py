"""Asks a server what users of Anthropic's own client ask, and prints what comes, as JSON lines.

python anthropic_client.py BASE_URL KEY MODEL QUESTION
"""

import json
import sys

import anthropic

base_url, key, model, question = sys.argv[1:]
ASKED = {"model": model, "messages": [{"role": "user", "content": question}]}
# The client has no such parameter any more, and the API still does.
GREEDY = {"max_tokens": 64, "extra_body": {"temperature": 0}}


def show(what: str, value: object) -> None:
    print(json.dumps([what, value]), flush=True)


with anthropic.Anthropic(base_url=base_url, api_key=key, max_retries=0) as client:
    message = client.messages.create(**GREEDY, **ASKED)
    show("message", [message.role, message.content[0].text, message.stop_reason])
    with client.messages.stream(**GREEDY, **ASKED) as stream:
        show("stream", "".join(stream.text_stream))
        show("usage", stream.get_final_message().usage.output_tokens)
    show("same", client.messages.count_tokens(**ASKED).input_tokens == message.usage.input_tokens)
    try:
        client.messages.create(max_tokens=1, **(ASKED | {"model": "another"}))
    except anthropic.APIStatusError as error:
        show("refused", [error.status_code, type(error).__name__])

with anthropic.Anthropic(base_url=base_url, api_key="wrong", max_retries=0) as client:
    try:
        client.messages.create(max_tokens=1, **ASKED)
    except anthropic.APIStatusError as error:
        show("refused", [error.status_code, type(error).__name__])
