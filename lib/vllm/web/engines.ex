defmodule VLLM.Web.Engines do
  @moduledoc false
  # Engines over HTTP: what there are, and what they are asked to do. That takes
  # as long as requests in flight and loading do, so it is begun here and goes on
  # without whoever asked.

  require Logger

  alias VLLM.Engine.{Config, Table}
  alias VLLM.{Error, OpenAI, Secrets}
  alias VLLM.Web.{Engine, Given, Live}

  # What is refused at once is told at once: for so long an operation is waited for, in ms.
  @at_once 300

  @doc "All engines of this node."
  def list(asked), do: {:ok, %{engines: Engine.all(asked.core, Live.now())}}

  @doc "An engine."
  def get(asked), do: with({:ok, engine} <- find(asked), do: answer(engine, asked))

  @doc "The last lines of its log."
  def log(asked) do
    with {:ok, {_key, table}} <- find(asked),
         do: {:ok, %{lines: Engine.log(table, asked.query["lines"])}}
  end

  defp find(asked), do: Engine.find(asked.params["id"])

  defp answer(engine, asked) do
    case Engine.view(engine, asked.core, Live.now()) do
      [view] -> {:ok, %{engine: view}}
      [] -> :none
    end
  end

  ## Starting

  @doc "Starts one, which belongs to the library and ends with it, or when it is stopped."
  def start(asked) do
    %{"model" => model} = asked.body

    with {:ok, options} <- Given.options(asked.body),
         {:ok, name} <- name(asked),
         key = OpenAI.Models.name(name),
         {:ok, config} <- Config.new(Map.merge(options, %{"model" => model, "name" => key})),
         owner = Process.whereis(VLLM.EngineSupervisor),
         {:ok, _pid} <- VLLM.Engine.start(%{config | owner: owner}),
         {:ok, table, _pid} <- Table.lookup(key),
         :ok <- OpenAI.Models.announce([OpenAI.Models.started(name)]),
         do: answer({key, table}, asked)
  end

  defp name(%{body: body} = asked) do
    taken = asked.core |> OpenAI.models() |> OpenAI.Models.engines()

    case body do
      %{"name" => name} -> if name in taken, do: {:error, taken(name)}, else: {:ok, name}
      %{"model" => model} -> {:ok, free(model, taken)}
    end
  end

  # Its own, with a number where that is taken.
  defp free(model, taken) do
    name = model |> Path.basename() |> String.replace(~r/[^A-Za-z0-9._:@-]/, "-")
    name = if name == "", do: "engine", else: String.slice(name, 0, 90)
    numbered = Stream.map(Stream.iterate(2, &(&1 + 1)), &"#{name}-#{&1}")
    [name] |> Stream.concat(numbered) |> Enum.find(&(&1 not in taken))
  end

  defp taken(name) do
    message = "An engine named `#{name}` is served here already: take another `name`."
    Error.new(:name_taken, message, %{"option" => "name"})
  end

  ## Operations

  @doc "Stops it."
  def stop(asked), do: operate(asked, "stop", &VLLM.stop/1)

  @doc "Takes replicas out of service."
  def drain(asked),
    do:
      operate(
        asked,
        "drain",
        &each(&1, asked, [:ready, :starting, :dead], fn one -> VLLM.drain(&1, one) end)
      )

  @doc "Brings back those that were, or are about to be: they are drained first."
  def resume(asked),
    do:
      operate(
        asked,
        "resume",
        &each(&1, asked, [:draining, :drained], fn one -> VLLM.restart(&1, one) end)
      )

  @doc "Starts replicas anew."
  def restart(asked),
    do: operate(asked, "restart", &VLLM.restart(&1, asked.body["replica"] || :all))

  @doc "Gives it other options."
  def reload(asked) do
    with {:ok, options} <- Given.options(asked.body),
         do: operate(asked, "reload", &VLLM.reload(&1, options))
  end

  @doc "Gives it so many replicas."
  def scale(asked), do: operate(asked, "scale", &VLLM.scale(&1, asked.body["replicas"]))

  # Of all replicas those in these states, or the one that is named.
  defp each(engine, %{body: body}, states, operation) do
    with {:ok, replicas} <- VLLM.replicas(engine) do
      chosen = body["replica"] && [body["replica"]]

      indexes =
        chosen || for(%{state: state, index: index} <- replicas, state in states, do: index)

      indexes |> Enum.map(operation) |> Enum.find(:ok, &(&1 != :ok))
    end
  end

  defp there?(_table, nil), do: true
  defp there?(table, replica), do: replica <= Table.replicas(table)

  defp operate(asked, name, operation) do
    with {:ok, {key, table} = engine} <- find(asked),
         {:ok, before} <- answer(engine, asked),
         {:there, true} <- {:there, there?(table, asked.body["replica"])} do
      task =
        Task.Supervisor.async_nolink(VLLM.Web.Tasks, fn ->
          note(table, name, :running, nil)
          operation.(key) |> done(key, table, name)
        end)

      case Task.yield(task, @at_once) do
        {:ok, {:error, error}} -> {:error, error}
        _done_or_not_yet -> begun(task, engine, before, asked)
      end
    else
      {:there, false} -> :none
      other -> other
    end
  end

  defp begun(task, engine, before, asked) do
    _ = Task.ignore(task)

    with :none <- answer(engine, asked),
         do: {:ok, put_in(before, [:engine, :state], :stopped)}
  end

  defp done(:ok, _key, table, name), do: note(table, name, :done, nil)

  defp done({:error, error}, key, table, name) do
    Logger.warning(fn -> "#{Secrets.inspect(key)}: #{name} failed. #{error.message}" end)
    note(table, name, :failed, error)
    {:error, error}
  end

  defp note(table, name, state, error) do
    Table.put_operation(table, %{name: name, state: state, error: error})
    :ok
  rescue
    # The table ended with its engine.
    ArgumentError -> :ok
  end
end
