defmodule VLLM.Bench.Engines do
  @moduledoc false
  # The engines that are measured: which these are, and that those of models are
  # started before and stopped after it.

  alias VLLM.Engine.{Config, Lifecycle, Progress, Table}
  alias VLLM.{Error, Options, Params, Secrets}

  @typedoc "An engine to be: its label and config, or one that runs."
  @type planned :: {:start, String.t(), Config.t()} | {:running, VLLM.engine()}

  @type t :: %{
          required(:engine) => VLLM.engine(),
          required(:label) => String.t(),
          required(:startup_seconds) => float() | nil,
          optional(atom()) => term()
        }

  @doc "What is to be measured: each of `targets`, and what the first of them is compared with."
  @spec plan(term(), term(), map()) :: {:ok, [planned(), ...]} | {:error, Error.t()}
  def plan(targets, against, options) do
    with {:ok, targets} <- targets(targets),
         {:ok, others} <- against(targets, against, options),
         :ok <- used(options, targets),
         do: planned(targets, others, options)
  end

  @doc "The Python of the first one and its environment, as options; none where it runs on another node."
  @spec where([planned(), ...]) :: %{atom() => term()}
  def where([first | _]) do
    with {:ok, config} <- config(first), do: Map.take(config.options, [:python, :env])
  end

  defp config({:start, _label, config}), do: {:ok, config}

  defp config({:running, engine}) do
    case Table.lookup(engine) do
      {:ok, table, _pid} -> {:ok, Table.config(table)}
      {:error, _elsewhere} -> %{}
    end
  end

  defp targets([_ | _] = targets), do: {:ok, Enum.uniq(targets)}
  defp targets([]), do: invalid("model", "There is no model and no engine to measure.")
  defp targets(target), do: {:ok, [target]}

  defp against(_targets, nil, _options), do: {:ok, []}

  defp against([model | _], other, options) when is_binary(model) and is_binary(other),
    do: against([model], %{"model" => other}, options)

  defp against([model | _], other, options) when is_binary(model) do
    with {:ok, other} <- Options.to_map(other, "against") do
      {other_model, settings} = Map.pop(other, "model", model)
      {:ok, [{label(other_model, settings), other_model, Map.merge(options, settings)}]}
    end
  end

  defp against(_engines, _other, _options) do
    message =
      "Options to compare with are for a model that is started here. Of engines that run, give both."

    invalid("against", message)
  end

  # Engines that run have their options.
  defp used(options, targets) do
    if options == %{} or Enum.any?(targets, &is_binary/1),
      do: :ok,
      else: {:error, Options.unknown(hd(Map.keys(options)), Options.names(Options.bench()))}
  end

  defp planned(targets, others, options) do
    all = for(target <- targets, do: target(target, options)) ++ others

    Params.map(all, fn
      {:running, _engine} = running ->
        {:ok, running}

      {label, model, options} ->
        with {:ok, config} <- Config.new(Map.put(options, "model", model)),
             do: {:ok, {:start, label, config}}
    end)
  end

  defp target(model, options) when is_binary(model), do: {label(model, %{}), model, options}
  defp target(engine, _options), do: {:running, engine}

  defp label(model, settings) do
    name = if is_binary(model) and File.exists?(model), do: Path.basename(model), else: model
    shown = for {name, _} = setting <- Enum.sort(settings), do: "#{name}=#{value(setting)}"
    Enum.join([name | shown], " ")
  end

  defp value({name, value}) do
    cond do
      Secrets.name?(name) -> "…"
      is_binary(value) -> value
      true -> Secrets.inspect(value)
    end
  end

  @doc """
  Starts those of models, one after another, and calls `fun` with all of them. Whatever it returns,
  they are stopped then. `show` is told how far each start is.
  """
  @spec started([planned(), ...], ((() -> String.t()) -> :ok), ([t(), ...] -> result)) ::
          result | {:error, Error.t()}
        when result: term()
  def started(planned, show, fun), do: start(planned, [], show, fun)

  defp start([], engines, _show, fun), do: engines |> Enum.reverse() |> told_apart() |> fun.()

  defp start([{:running, engine} | rest], engines, show, fun) do
    with {:ok, info} <- VLLM.engine_info(engine) do
      label = if is_atom(engine), do: inspect(engine), else: label(info.model, %{})
      start(rest, [known(engine, label, nil, info) | engines], show, fun)
    end
  end

  defp start([{:start, label, config} | rest], engines, show, fun) do
    began = System.monotonic_time(:millisecond)

    case Lifecycle.start(config, fn progress ->
           show.(fn -> "#{label}: #{Progress.describe(progress)}" end)
         end) do
      {:ok, llm} ->
        seconds = (System.monotonic_time(:millisecond) - began) / 1000

        try do
          with {:ok, info} <- VLLM.engine_info(llm),
               do: start(rest, [known(llm, label, seconds, info) | engines], show, fun)
        after
          VLLM.stop(llm)
        end

      {:error, error} ->
        {:error, Options.or_ours(error, Options.bench())}
    end
  end

  defp known(engine, label, seconds, info) do
    %{
      engine: engine,
      label: label,
      startup_seconds: seconds,
      model: info.model,
      quantization: info.quantization,
      kv_cache_dtype: info.kv_cache_dtype,
      device: info.device_name || info.device,
      replicas: length(VLLM.replicas!(engine))
    }
  end

  # Two of the same name have numbers.
  defp told_apart(engines) do
    labels = Enum.frequencies_by(engines, & &1.label)

    engines
    |> Enum.with_index(1)
    |> Enum.map(fn {%{label: label} = engine, number} ->
      if labels[label] > 1, do: %{engine | label: "#{label} (#{number})"}, else: engine
    end)
  end

  defp invalid(option, message),
    do: {:error, Error.new(:invalid_option, message, %{"option" => option})}
end
