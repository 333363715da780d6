defmodule VLLM.DemoModel do
  @moduledoc "The demo model, its variants, and what it knows by heart."

  @doc "The folder of a variant: `\"demo\"`, `\"demo-awq\"`, `\"demo-gptq\"`."
  def path(variant \\ "demo"), do: Application.app_dir(:ex_vllm, "priv/models/#{variant}")

  @doc "Options with which an engine starts in seconds, and takes little memory."
  def options do
    [
      name: nil,
      max_model_len: 1024,
      enforce_eager: true,
      kv_cache_memory_bytes: 64 * 1024 * 1024
    ]
  end

  def start!(variant \\ "demo", options \\ []) do
    VLLM.llm!(path(variant), Keyword.merge(options(), options))
  end

  @doc "Prompts and the one right completion of each."
  def facts, do: pairs("facts.tsv")

  @doc "What a user says and the one right answer."
  def chats, do: pairs("chat.tsv")

  @doc "The facts that the adapter `demo-lora` changes, and what it makes of them."
  def adapter_facts, do: pairs("demo-lora.tsv")

  defp pairs(file) do
    Application.app_dir(:ex_vllm, "priv/models/#{file}")
    |> File.read!()
    |> String.split("\n", trim: true)
    |> Enum.map(&List.to_tuple(String.split(&1, "\t")))
  end

  @doc "The facts whose greedy completion is wrong: `[{prompt, expected, got}]`."
  def wrong_facts(llm) do
    {prompts, expected} = Enum.unzip(facts())
    outputs = VLLM.generate!(llm, prompts, temperature: 0.0, max_tokens: 64)

    for {prompt, right, got} <- Enum.zip([prompts, expected, VLLM.text(outputs)]),
        right != got,
        do: {prompt, right, got}
  end
end
