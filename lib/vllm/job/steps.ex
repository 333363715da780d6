defmodule VLLM.Job.Steps do
  @moduledoc false
  # The steps that all kinds of jobs take: whether their names are free, finding
  # their source, and giving what they have made its place and its name; and what
  # comes of these.

  alias VLLM.{Data, Error}
  alias VLLM.Job.{Output, Record, Source, Step, Store}

  @doc """
  Whether the names are free that outputs are to have which are still to be made. `named` tells the
  name and the label of each.
  """
  @spec names(Record.t(), (Output.t() -> {String.t(), String.t() | nil})) :: Step.t()
  def names(job, named) do
    names =
      for %{state: :waiting} = output <- job.outputs, {name, label} = named.(output) do
        [name, label, Data.model(job.name, output.label)]
      end

    %Step{
      name: :names,
      state: :preparing,
      at: :tools,
      method: "taken",
      params: %{"names" => names}
    }
  end

  @doc "`remedy` is what else than a deletion the user can do about a name that is taken."
  @spec named(Record.t(), [map()], String.t()) :: {:ok, Record.t()} | {:error, Error.t()}
  def named(job, [], _remedy), do: {:ok, remember(job, :named, true)}

  def named(_job, [%{"name" => name, "by" => by, "delete" => delete} | _], remedy) do
    deletion =
      if delete,
        do: "delete that one: `VLLM.Models.delete(#{inspect(delete)})`",
        else: "remove that folder, which has no name"

    message = "The name `#{name}` is #{by} already. #{remedy}, or #{deletion}."
    {:error, Error.new(:name_taken, message, %{"name" => name})}
  end

  @doc "Where the model is; it may have to be downloaded."
  @spec pull(Record.t()) :: Step.t()
  def pull(job) do
    params = %{"model" => job.source, "options" => job.options["engine"]}
    %Step{name: :pull, state: :downloading, at: :tools, method: "pull", params: params}
  end

  @spec pulled(Record.t(), map()) :: Record.t()
  def pulled(job, %{"path" => path} = pulled) do
    %{job | path: path}
    |> remember(:path, path)
    |> remember(:repository, pulled["repository"])
    |> remember(:commit, pulled["commit"])
  end

  @doc "What the model is called in what is made of it: its id on the hub, or as the job was given it."
  @spec source(Record.t()) :: String.t()
  def source(job), do: job.memo.repository || job.source

  @doc "What its files say, so that a change is seen."
  @spec look(Record.t()) :: Step.t()
  def look(%Record{memo: %{path: path}}),
    do: %Step{name: :look, state: :preparing, run: fn -> Source.fingerprint(path) end}

  @spec looked(Record.t(), term()) :: Record.t()
  def looked(job, fingerprint), do: remember(%{job | fingerprint: fingerprint}, :seen, true)

  @doc "Whether it is still what it was then, for what comes before a step."
  @spec unchanged(Record.t()) :: (() -> :ok | {:error, VLLM.Error.t()})
  def unchanged(%Record{memo: %{path: path}, fingerprint: fingerprint}),
    do: fn -> Source.unchanged(path, fingerprint) end

  @doc "Where an output is made."
  @spec made(Record.t(), String.t()) :: Path.t()
  def made(job, label), do: Path.join(Store.tmp(job.id), label)

  @doc "Gives an output its place among the models, and then the name `registered`."
  @spec place(Record.t(), Output.t(), map()) :: Step.t()
  def place(job, %Output{label: label} = output, registered) do
    if is_map_key(job.memo, {:published, label}),
      do: register(job, output, registered),
      else: publish(job, label)
  end

  defp publish(job, label) do
    {from, to} = {made(job, label), Data.model(job.name, label)}

    %Step{
      name: :publish,
      state: :verifying,
      output: label,
      output_state: :registering,
      before: unchanged(job),
      run: fn -> Store.publish(job.id, from, to) end
    }
  end

  @spec published(Record.t(), String.t(), Path.t()) :: Record.t()
  def published(job, label, path) do
    job
    |> Record.update_output(label, &%{&1 | path: path})
    |> remember({:published, label}, true)
  end

  defp register(job, output, registered) do
    how = %{
      "by" => Atom.to_string(job.kind),
      "at" => DateTime.to_iso8601(Record.now()),
      "job" => job.id,
      "options" => output.options,
      "libraries" => output.libraries
    }

    params = %{
      "path" => Data.model(job.name, output.label),
      "source" => source(job),
      "revision" => job.memo.commit || job.fingerprint
    }

    %Step{
      name: :register,
      state: :verifying,
      output: output.label,
      output_state: :registering,
      at: :tools,
      method: "register",
      params: params |> Map.merge(registered) |> Map.update("made", how, &Map.merge(how, &1))
    }
  end

  @doc "A job that is retried: it goes on where it was."
  @spec again(Record.t()) :: Record.t()
  def again(job) do
    outputs =
      for output <- job.outputs do
        cond do
          output.state == :done -> output
          published?(job, output) -> %{output | state: :registering, error: nil}
          true -> %{output | state: :waiting, error: nil, path: nil}
        end
      end

    %{job | outputs: outputs}
  end

  @doc """
  Whether an output of the job has its place. It may lack its name: its registration failed, or was cut
  off, or was not even noted.
  """
  @spec published?(Record.t(), Output.t()) :: boolean()
  def published?(job, %Output{label: label}),
    do: Store.published?(job.id, Data.model(job.name, label))

  @spec remember(Record.t(), term(), term()) :: Record.t()
  def remember(job, name, value), do: %{job | memo: Map.put(job.memo, name, value)}
end
