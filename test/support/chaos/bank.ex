defmodule VLLM.Chaos.Bank do
  @moduledoc """
  What callers ask, and the one right answer to each.

    * `:prompts`, `:streams` - prompts and their completions, all of them
    * `:chats` - what users say and the answers
    * `:texts` - what tokens are made of, and text again
    * `:long`, `:long_streams` - prompts that take long, and how their completion begins: for those
      who leave early
    * `:malformed` - prompts and options that make no sense, and what may be said about them
    * `:options`, `:long_options` - of the calls
  """

  alias VLLM.DemoModel

  @doc "For the demo model."
  def demo do
    %{
      prompts: DemoModel.facts(),
      streams: DemoModel.facts(),
      chats: DemoModel.chats(),
      texts: for({prompt, completion} <- DemoModel.facts(), do: prompt <> completion),
      long: DemoModel.facts(),
      long_streams: DemoModel.facts(),
      malformed: [
        {"The", [temperature: -1.0], [:invalid_option]},
        {"The", [temprature: 1.0], [:invalid_option]},
        {"The", [max_tokens: 0], [:invalid_option]},
        {"", [], [:invalid_prompt]},
        {:no_prompt, [], [:invalid_prompt]},
        {%{prompt_token_ids: [-1]}, [], [:invalid_prompt]},
        {String.duplicate("The capital of France is Paris. ", 400), [], [:prompt_too_long]}
      ],
      options: [temperature: 0.0, max_tokens: 64],
      long_options: [temperature: 0.0, max_tokens: 400, ignore_eos: true]
    }
  end

  @doc "For `fake_worker.py`."
  def fake do
    %{
      prompts: for(n <- 1..50, do: {"reply:answer #{n}", "answer #{n}"}),
      streams: for(n <- 1..50, do: {"delta:answer ;delta:#{n};reply:answer #{n}", "answer #{n}"}),
      chats: [],
      texts: [],
      long: for(n <- 1..50, do: {"hold", "wait #{n}"}),
      long_streams: for(n <- 1..50, do: {"delta:wait ;delta:#{n};hold", "wait #{n}"}),
      malformed: [
        {"reply:x", [temprature: 1.0], [:invalid_option]},
        {"error:invalid_prompt", [], [:invalid_prompt]},
        {:no_prompt, [], [:invalid_prompt]}
      ],
      options: [],
      long_options: []
    }
  end
end
