defmodule VLLM.Upkeep do
  @moduledoc false
  # What an engine is asked besides its work; see the functions of VLLM that
  # delegate here, and vllm_bridge/tokenizer.py and admin.py.

  alias VLLM.Bridge.MessagePack
  alias VLLM.Engine.{Call, Router, Table}
  alias VLLM.{Error, Options, Prompt, RequestOutput}

  @doc "See `VLLM.tokenize/3`."
  def tokenize(engine, text, options) when is_binary(text) do
    with {:ok, [tokens]} <- tokenize(engine, [text], options), do: {:ok, tokens}
  end

  def tokenize(engine, texts, options) do
    with {:ok, opts} <- Options.only(options, Options.tokenize()),
         {:ok, texts} <- texts(texts),
         {:ok, table, _pid} <- Table.lookup(engine),
         requests =
           Enum.map(texts, &%{"text" => &1, "add_special_tokens" => opts.add_special_tokens}),
         {:ok, results} <-
           Router.map(table, "tokenize", requests, Call.new(opts)) do
      {:ok, Enum.map(results, &RequestOutput.token_ids(&1["token_ids"]))}
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
         {:ok, table, _pid} <- Table.lookup(engine),
         params = %{
           "token_ids" => MessagePack.bin(bytes),
           "skip_special_tokens" => opts.skip_special_tokens
         },
         {:ok, result} <-
           Router.call(table, "detokenize", params, Call.new(opts)) do
      {:ok, result["text"]}
    end
  end

  @doc "Asks every worker of the engine; `specs` are the options that go along."
  @spec each(VLLM.engine(), String.t(), keyword() | map(), [Options.spec()]) ::
          {:ok, [term()]} | {:error, Error.t()}
  def each(engine, method, options, specs \\ Options.call()) do
    with {:ok, opts} <- Options.only(options, specs),
         {:ok, table, _pid} <- Table.lookup(engine) do
      params =
        Map.new(Map.delete(opts, :timeout), fn {name, value} -> {Atom.to_string(name), value} end)

      Router.each(table, method, params, Call.new(opts))
    end
  end

  @doc "Like `each/4`, where the workers have nothing to say."
  @spec tell(VLLM.engine(), String.t(), keyword() | map(), [Options.spec()]) ::
          :ok | {:error, Error.t()}
  def tell(engine, method, options, specs \\ Options.call()) do
    with {:ok, _} <- each(engine, method, options, specs), do: :ok
  end

  @doc "The figures of several workers as one: shares are averaged, all else is added up."
  @spec merge([%{String.t() => term()}]) :: %{String.t() => term()}
  def merge(figures) do
    count = length(figures)

    figures
    |> Enum.reduce(fn one, all -> Map.merge(all, one, fn _name, a, b -> add(a, b) end) end)
    |> Map.new(fn {name, value} ->
      {name, if(String.ends_with?(name, "_perc"), do: value / count, else: value)}
    end)
  end

  defp add(a, b) when is_map(a), do: Map.merge(a, b, fn _, x, y -> x + y end)
  defp add(a, b), do: a + b
end
