defmodule VLLM.Tokenizer do
  @moduledoc false
  # Texts and tokens, by the tokenizer of an engine's model.

  alias VLLM.Bridge.MessagePack
  alias VLLM.Engine.Call
  alias VLLM.{Error, Options, Prompt, Remote, TokenIds}

  @doc "See `VLLM.tokenize/3`."
  def tokenize(engine, text, options) when is_binary(text) do
    with {:ok, [tokens]} <- tokenize(engine, [text], options), do: {:ok, tokens}
  end

  def tokenize(engine, texts, options) do
    with {:ok, opts} <- Options.only(options, Options.tokenize()),
         {:ok, texts} <- texts(texts),
         requests =
           Enum.map(texts, &%{"text" => &1, "add_special_tokens" => opts.add_special_tokens}),
         {:ok, results} <- Remote.run(engine, {:map, "tokenize", requests}, Call.new(opts)) do
      {:ok, Enum.map(results, &TokenIds.unpack(&1["token_ids"]))}
    end
  end

  defp texts(texts) do
    if is_list(texts) and not List.improper?(texts) and
         Enum.all?(texts, &(is_binary(&1) and MessagePack.text?(&1))),
       do: {:ok, texts},
       else:
         {:error,
          Error.new(
            :invalid_prompt,
            "What is to be tokenized is a string of valid UTF-8 or a list of such strings."
          )}
  end

  @doc "See `VLLM.detokenize/3`."
  def detokenize(engine, token_ids, options) do
    with {:ok, opts} <- Options.only(options, Options.detokenize()),
         {:ok, bytes} <- Prompt.pack_token_ids(token_ids),
         params = %{
           "token_ids" => MessagePack.bin(bytes),
           "skip_special_tokens" => opts.skip_special_tokens
         },
         {:ok, [result]} <- Remote.run(engine, {:map, "detokenize", [params]}, Call.new(opts)) do
      {:ok, result["text"]}
    end
  end
end
