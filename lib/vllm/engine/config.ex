defmodule VLLM.Engine.Config do
  @moduledoc false
  # What an engine was started with. It is part of child specs, process states
  # and crash reports, so everything that may be secret (environment, tokens)
  # sits inside a function, which no formatter opens.

  alias VLLM.Bridge.Program
  alias VLLM.Engine.Table
  alias VLLM.{Error, Options}

  @enforce_keys [:name, :model, :engine_options, :secrets, :options]
  defstruct [:name, :model, :engine_options, :secrets, :options, :owner, :start_program]

  @type t :: %__MODULE__{
          name: term(),
          model: String.t(),
          engine_options: %{String.t() => term()},
          options: %{atom() => term()},
          secrets: (() -> %{env: map(), engine_options: map()}),
          owner: pid() | nil,
          # What runs instead of Python; only VLLM.Test gives it.
          start_program: (Table.t() -> {:ok, Program.t()}) | nil
        }

  @doc "Checks the options of `VLLM.llm/2` and `{VLLM, options}`; vLLM's own are passed on as they are."
  @spec new(keyword() | map()) :: {:ok, t()} | {:error, Error.t()}
  def new(given) do
    with {:ok, options, rest} <- Options.split(given, Options.engine()),
         {:ok, model, rest} <- model(rest) do
      {secret, plain} = Map.split(rest, ["hf_token"])

      {:ok,
       %__MODULE__{
         name: options.name,
         model: model,
         engine_options: plain,
         options: Map.drop(options, [:name, :env]),
         secrets: fn -> %{env: options.env, engine_options: secret} end
       }}
    end
  end

  defp model(rest) do
    case Map.pop(rest, "model") do
      {model, rest} when is_binary(model) and model != "" ->
        {:ok, Options.expand(model), rest}

      {nil, _} ->
        {:error,
         Error.new(
           :invalid_option,
           "No model is given; name a folder or a hub id with `model:`.",
           %{
             "option" => "model"
           }
         )}

      {other, _} ->
        {:error,
         Error.new(
           :invalid_option,
           "`model` is a folder's path or a hub id as a string; got #{inspect(other)}.",
           %{"option" => "model"}
         )}
    end
  end
end
