defmodule VLLM.Engine.Config do
  @moduledoc false
  # What an engine was started with. It is part of process states and crash
  # reports, so everything that may be secret (environment, tokens, and with
  # them the options as they were given) sits inside a function, which no
  # formatter opens.

  alias VLLM.Bridge.{MessagePack, Program}
  alias VLLM.Engine.Table
  alias VLLM.{AllowedModels, Error, Options, Secrets}

  @enforce_keys [:name, :model, :engine_options, :secrets, :options]
  defstruct [:name, :model, :engine_options, :secrets, :options, :owner, :start_program]

  @type t :: %__MODULE__{
          name: term(),
          model: String.t(),
          engine_options: %{String.t() => term()},
          options: %{atom() => term()},
          secrets: (() -> secrets()),
          owner: pid() | nil,
          # What runs instead of Python; only VLLM.Test gives it.
          start_program: (Table.t() -> {:ok, Program.t()}) | nil
        }

  @typedoc "The environment, one for all replicas or a list; engine options; all that was given."
  @type secrets :: %{env: map() | [map()], engine_options: map(), given: map()}

  @doc "Checks the options of `VLLM.llm/2` and `{VLLM, options}`; vLLM's own are passed on as they are."
  @spec new(keyword() | map()) :: {:ok, t()} | {:error, Error.t()}
  def new(options) do
    with {:ok, given} <- Options.to_map(options),
         {:ok, options, rest} <- Options.split(given, Options.engine()),
         {:ok, model, rest} <- model(rest),
         :ok <- AllowedModels.check(model, options.allowed_models),
         {:ok, rest} <- Options.to_wire(rest),
         :ok <- check_nodes(options.nodes, rest),
         {:ok, options} <- replicas(options),
         {env, options} = Map.pop!(options, :env),
         options = Map.put(options, :environments, count(env)),
         :ok <- check_replicas(options, options.replicas) do
      {secret, plain} = Enum.split_with(rest, &Secrets.any?/1)

      {:ok,
       %__MODULE__{
         name: options.name,
         model: model,
         engine_options: Map.new(plain),
         options: Map.delete(options, :name),
         secrets: fn -> %{env: env, engine_options: Map.new(secret), given: given} end
       }}
    end
  end

  # What says of a part of the model which it is; with `nodes` that is known.
  @parts ["nnodes", "node_rank"]

  defp check_nodes(nil, _rest), do: :ok

  defp check_nodes([first | _], _rest) when first != node() do
    hint =
      if Node.alive?(),
        do: "Start the engine there, or begin the list with this one.",
        else: "Start this one with `--name` or `--sname`."

    invalid("nodes", "The first of `nodes` is #{first}, and this node is #{node()}. #{hint}")
  end

  defp check_nodes(_nodes, rest) do
    case Enum.find(@parts, &is_map_key(rest, &1)) do
      nil -> :ok
      name -> invalid(name, "`#{name}` is given by `nodes`; leave it out.")
    end
  end

  # What belongs to the engine rather than to its workers.
  @fixed ["name", "replicas"]

  @doc "The config with `options` over those that it was made of."
  @spec merge(t(), keyword() | map()) :: {:ok, t()} | {:error, Error.t()}
  def merge(config, options) do
    with {:ok, options} <- Options.to_map(options),
         :ok <- check_fixed(options),
         given = Map.delete(config.secrets.().given, "replicas"),
         {:ok, merged} <- new(Map.merge(given, options)) do
      {:ok, %{merged | owner: config.owner, start_program: config.start_program}}
    end
  end

  defp check_fixed(options) do
    case Enum.find(@fixed, &is_map_key(options, &1)) do
      nil ->
        :ok

      name ->
        invalid(name, "`#{name}` is the engine's own and stays; for replicas see `VLLM.scale/3`.")
    end
  end

  @doc "Whether there are devices and environments for so many replicas."
  @spec check_replicas(t() | map(), pos_integer()) :: :ok | {:error, Error.t()}
  def check_replicas(%__MODULE__{options: options}, replicas),
    do: check_replicas(options, replicas)

  def check_replicas(options, replicas) do
    cond do
      fewer?(count(options.devices), replicas) ->
        too_few("devices", length(options.devices), replicas)

      fewer?(options.environments, replicas) ->
        too_few("env", options.environments, replicas)

      true ->
        :ok
    end
  end

  defp count([_ | _] = list), do: length(list)
  defp count(_one_for_all), do: nil

  defp fewer?(count, replicas), do: is_integer(count) and count < replicas

  defp too_few(option, count, replicas) do
    invalid(
      option,
      "`#{option}` has #{count} entries, and there are to be #{replicas} replicas; give one for each."
    )
  end

  defp replicas(%{replicas: nil} = options) do
    {:ok, %{options | replicas: count(options.devices) || 1}}
  end

  defp replicas(%{replicas: replicas, devices: devices})
       when is_list(devices) and length(devices) > replicas do
    invalid(
      "devices",
      "`devices` has #{length(devices)} entries, and `replicas` is #{replicas}; leave " <>
        "`replicas` out, or make the two fit."
    )
  end

  defp replicas(options), do: {:ok, options}

  @doc "What logs call the engine."
  @spec display_name(t()) :: String.t()
  def display_name(%__MODULE__{name: nil, model: model}), do: Path.basename(model)
  def display_name(%__MODULE__{name: name}), do: inspect(name)

  @doc "The devices of a replica; nil where the engine takes what it finds."
  @spec devices(t(), pos_integer()) :: [non_neg_integer() | String.t()] | nil
  def devices(%__MODULE__{options: %{devices: nil}}, _index), do: nil
  def devices(%__MODULE__{options: %{devices: devices}}, index), do: Enum.at(devices, index - 1)

  @doc "The environment of a replica."
  @spec env(t(), pos_integer()) :: Enumerable.t()
  def env(config, index) do
    case config.secrets.().env do
      [_ | _] = env -> Enum.at(env, index - 1)
      env -> env
    end
  end

  defp model(rest) do
    case Map.pop(rest, "model") do
      {model, rest} when is_binary(model) and model != "" ->
        if MessagePack.text?(model),
          do: {:ok, Options.expand(model), rest},
          else: invalid("model", "`model` is not valid UTF-8.")

      {nil, _} ->
        invalid(
          "model",
          "No model is given; name a folder, a GGUF file or a hub id with `model:`."
        )

      {other, _} ->
        invalid(
          "model",
          "`model` is a path or a hub id as a string; got #{Secrets.inspect(other)}."
        )
    end
  end

  defp invalid(option, message) do
    {:error, Error.new(:invalid_option, message, %{"option" => option})}
  end
end
