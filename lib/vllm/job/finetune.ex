defmodule VLLM.Job.Finetune do
  @moduledoc false
  # The kind of job that trains an adapter. Its steps:
  #
  #     names       are the names free that the outputs are to have?
  #     check       can such an adapter be trained over it, with these data and options? (before a
  #                 download: as far as its headers tell)
  #     pull        where is the model? It may have to be downloaded
  #     look        what do its files say, so that a change is seen?
  #     check       all of it, with its tokenizer
  #     train       the adapter, in the job's folder; a retry goes on from the last state
  #     publish     it gets its place
  #     register    and its name
  #     merge       with `merge: true` a model of the two, published and registered likewise

  @behaviour VLLM.Job.Kind

  alias VLLM.{AllowedModels, Data, Error, Options, Python}
  alias VLLM.Bridge.Session
  alias VLLM.Job.{Estimate, Output, Record, Settings, Source, Step, Steps, Store}

  @adapter "adapter"
  @merged "merged"

  # Its libraries take their time to be imported, and much data to be cut, in ms.
  @check_timeout 600_000

  @doc """
  The record of a new job, from what the user gave; `known` are the checked options, with those of the
  training in `:training`.
  """
  @spec new(String.t(), term(), map()) :: {:ok, Record.t()} | {:error, Error.t()}
  def new(model, data, known) do
    with {:ok, model} <- Options.check(:string, :model, model),
         model = Options.expand(model),
         :ok <- AllowedModels.check(model, known.allowed_models),
         {:ok, data} <- records(:data, data),
         {:ok, name} <- called(known.to),
         {:ok, training} <- training(known.training) do
      options = %{
        "data" => data,
        "training" => training,
        "engine" => given(known, [:revision, :subfolder, :download_dir]),
        "workers" => given(known, Options.names(Options.workers()))
      }

      merged = if training["merge"], do: [%Output{label: @merged, format: "plain"}], else: []

      {:ok,
       %Record{
         id: Record.new_id(),
         kind: :finetune,
         name: name,
         source: model,
         options: options,
         outputs: [%Output{label: @adapter, format: "adapter"} | merged],
         made_at: Record.now()
       }}
    end
  end

  defp given(known, names),
    do: for(name <- names, value = known[name], into: %{}, do: {Atom.to_string(name), value})

  # A path, or a list of which `{prompt, completion}` is a short form.
  defp records(_name, path) when is_binary(path), do: {:ok, Path.expand(path)}

  defp records(name, list) when is_list(list) do
    Options.check(:wire, name, Enum.map(list, &record/1))
  end

  defp records(name, other) do
    message =
      "`#{name}` must be a list of records, or the path of a file or folder; got " <>
        "#{VLLM.Secrets.inspect(other)}."

    {:error, Error.new(:invalid_option, message, %{"option" => to_string(name)})}
  end

  defp record({prompt, completion}), do: %{"prompt" => prompt, "completion" => completion}
  defp record(record), do: record

  # The worker checks them; here only data among them gets its form.
  defp training(options) do
    ["held_out", "replay"]
    |> Enum.reduce_while({:ok, options}, fn name, {:ok, options} ->
      case with_records(options, name, options[name]) do
        {:ok, options} -> {:cont, {:ok, options}}
        error -> {:halt, error}
      end
    end)
    |> then(&with {:ok, options} <- &1, do: Options.check(:wire, :options, options))
  end

  defp with_records(options, name, given) when is_binary(given) or is_list(given),
    do: with({:ok, records} <- records(name, given), do: {:ok, Map.put(options, name, records)})

  defp with_records(options, _name, _share), do: {:ok, options}

  defp called(name) when is_binary(name) do
    if name =~ ~r/\A[A-Za-z0-9][A-Za-z0-9._-]{0,95}\z/,
      do: {:ok, name},
      else: {:error, no_name(name)}
  end

  defp called(other), do: {:error, no_name(other)}

  defp no_name(name) do
    message =
      "An adapter cannot be called #{inspect(name)}: give `to:` a name of letters, digits, `.`, " <>
        "`_` and `-` that begins with a letter or a digit."

    Error.new(:invalid_option, message, %{"option" => "to"})
  end

  @doc "What a job would take; `settings` are those of its workers."
  @spec estimate(Record.t(), map()) :: {:ok, Estimate.t()} | {:error, Error.t()}
  def estimate(job, settings) do
    params = Map.put(params(job, job.source), "engine", job.options["engine"])

    with {:ok, python} <- serving(settings),
         workers = [python: python, env: Settings.environment(settings)],
         {:ok, checked} <-
           Session.run(:job, workers, &Session.call(&1, "check_finetune", params, @check_timeout)) do
      asked =
        for output <- job.outputs do
          %{
            "label" => output.label,
            "format" => output.format,
            "options" => if(output.label == @adapter, do: checked["options"], else: %{})
          }
        end

      {:ok, Estimate.new(job.source, asked, checked)}
    end
  end

  defp serving(%{python: nil}), do: Python.executable()
  defp serving(%{python: python}), do: {:ok, python}

  ## Steps

  @impl true
  def next(%Record{memo: memo} = job) do
    cond do
      not is_map_key(memo, :named) -> Steps.names(job, &{name(job, &1), nil})
      elsewhere?(job) -> check(job, job.source, job.options["engine"])
      not is_map_key(memo, :path) -> Steps.pull(job)
      not is_map_key(memo, :seen) -> Steps.look(job)
      not is_map_key(memo, :checked) -> check(job, memo.path, %{})
      output = Enum.find(job.outputs, &(&1.state != :done)) -> next(job, output)
      true -> :done
    end
  end

  # It may have to be downloaded, and nobody has looked at it yet.
  defp elsewhere?(%Record{memo: memo, source: source}),
    do:
      not is_map_key(memo, :path) and not is_map_key(memo, :foreseen) and not File.exists?(source)

  defp next(job, %Output{state: :registering} = output),
    do: Steps.place(job, output, %{"name" => name(job, output)})

  defp next(job, %Output{label: @adapter}), do: train(job)
  defp next(job, %Output{label: @merged}), do: merge(job)

  defp check(job, model, engine) do
    %Step{
      name: :check,
      state: :preparing,
      at: :serve,
      method: "check_finetune",
      params: Map.put(params(job, model), "engine", engine)
    }
  end

  defp train(job) do
    foreseen = foreseen(job, @adapter)

    out = %{
      "out" => Steps.made(job, @adapter),
      "states" => Store.keep(job.id),
      "base" => Steps.source(job)
    }

    %Step{
      name: :train,
      state: :training,
      output: @adapter,
      output_state: :training,
      before: Steps.unchanged(job),
      memory: foreseen["memory"] || 0,
      disk: foreseen["disk"] || 0,
      at: :serve,
      method: "finetune",
      params: Map.merge(params(job, job.memo.path), out)
    }
  end

  defp foreseen(job, label),
    do: Enum.find(job.memo.checked["outputs"], &(&1["label"] == label))

  defp params(job, model) do
    %{
      "model" => model,
      "data" => job.options["data"],
      "options" => job.options["training"]
    }
  end

  defp merge(job) do
    foreseen = foreseen(job, @merged)

    %Step{
      name: :merge,
      state: :training,
      output: @merged,
      output_state: :training,
      before: Steps.unchanged(job),
      memory: foreseen["memory"] || 0,
      disk: foreseen["disk"] || 0,
      at: :serve,
      method: "merge",
      params: %{
        "model" => job.memo.path,
        "adapter" => Data.model(job.name, @adapter),
        "out" => Steps.made(job, @merged)
      }
    }
  end

  ## What came of them

  @impl true
  def done(job, %Step{name: :names}, taken),
    do: Steps.named(job, taken, "Give `to:` another name")

  def done(job, %Step{name: :pull}, pulled), do: {:ok, Steps.pulled(job, pulled)}

  # A training goes on over the model that it began over.
  def done(job, %Step{name: :look}, fingerprint) do
    if job.fingerprint in [nil, fingerprint],
      do: {:ok, Steps.looked(job, fingerprint)},
      else: {:error, Source.changed(job.memo.path)}
  end

  def done(job, %Step{name: :check}, %{"outputs" => _} = checked) do
    found = if is_map_key(job.memo, :path), do: :checked, else: :foreseen
    {:ok, Steps.remember(job, found, checked)}
  end

  def done(job, %Step{name: name, output: label}, %{"files" => %{}} = made)
      when name in [:train, :merge] do
    figures = Map.drop(made, ~w(options libraries files bytes seconds peak_memory_bytes notes))

    {:ok,
     Record.update_output(job, label, fn output ->
       %{
         output
         | state: :registering,
           options: made["options"] || %{},
           libraries: made["libraries"] || %{},
           files: made["files"],
           bytes: made["bytes"],
           seconds: made["seconds"],
           peak_memory_bytes: made["peak_memory_bytes"],
           notes: made["notes"] || [],
           figures: figures
       }
     end)}
  end

  def done(job, %Step{name: :publish, output: label}, path),
    do: {:ok, Steps.published(job, label, path)}

  def done(job, %Step{name: :register, output: label}, _model),
    do: {:ok, Record.update_output(job, label, &%{&1 | state: :done, name: name(job, &1)})}

  @impl true
  def failed(_job, _step, error), do: {:error, error}

  @impl true
  def again(job), do: Steps.again(job)

  @impl true
  def name(job, %Output{label: @adapter}), do: job.name
  def name(job, %Output{label: @merged}), do: job.name <> "-" <> @merged
end
