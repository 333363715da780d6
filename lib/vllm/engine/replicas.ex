defmodule VLLM.Engine.Replicas do
  @moduledoc false
  # What is done to the replicas of an engine: more or fewer of them, one after
  # another with new options, drained and begun anew. Each function is one
  # operation of VLLM.Engine.Control, so that no two run at once.

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Config, Control, Table, Worker}
  alias VLLM.{Error, Options, Replica, Secrets}

  @doc "See `VLLM.replicas/1`."
  def list(engine) do
    with {:ok, table, _pid} <- Table.lookup(engine), do: {:ok, replicas(table)}
  rescue
    # The table ended with its engine.
    ArgumentError -> {:error, Control.not_running()}
  end

  defp replicas(table) do
    for index <- 1..Table.replicas(table), status = Table.status(table, index), status != nil do
      {state, error} =
        case status do
          {:failed, error} -> {:failed, error}
          state -> {state, nil}
        end

      %Replica{
        index: index,
        node: node(),
        state: state,
        error: error,
        in_flight: in_flight(state, Table.run(table, index)),
        devices: Config.devices(Table.config(table, index), index)
      }
    end
  end

  # In other states the only requests in flight are the worker's own.
  defp in_flight(state, {_program, conn}) when state in [:ready, :draining],
    do: Connection.in_flight(conn)

  defp in_flight(_state, _run), do: 0

  @doc "See `VLLM.scale/3`."
  def scale(engine, count, options) do
    operate(engine, options, fn table, timeout ->
      with :ok <- check_count(count),
           :ok <- Config.check_replicas(Table.config(table), count) do
        now = Table.replicas(table)

        cond do
          count > now -> grow(table, Enum.to_list((now + 1)..count), timeout)
          count < now -> shrink(table, Enum.to_list((count + 1)..now), timeout)
          true -> :ok
        end
      end
    end)
  end

  defp grow(table, indexes, timeout) do
    for index <- indexes do
      spec = Worker.child_spec({table, index})
      {:ok, _} = Supervisor.start_child(Table.workers_supervisor(table), spec)
    end

    Table.put_replicas(table, List.last(indexes))

    # All of the new replicas or none.
    with {:error, error} <- Worker.each(table, indexes, &Worker.await/1) do
      _ = shrink(table, indexes, timeout)
      {:error, error}
    end
  end

  defp shrink(table, indexes, timeout) do
    result = Worker.each(table, indexes, &Worker.drain(&1, timeout))
    for index <- indexes, do: remove(table, index)
    Table.put_replicas(table, hd(indexes) - 1)
    result
  end

  @doc "See `VLLM.drain/3`."
  def drain(engine, index, options) do
    operate(engine, options, fn table, timeout ->
      with :ok <- check_index(table, index),
           do: Worker.each(table, [index], &Worker.drain(&1, timeout))
    end)
  end

  @doc "See `VLLM.restart/3`: first those that do not serve, then one by one."
  def restart(engine, :all, options) do
    operate(engine, options, fn table, timeout ->
      {serving, others} =
        Enum.split_with(1..Table.replicas(table), &(Table.status(table, &1) == :ready))

      with :ok <- Worker.each(table, others, &Worker.restart(&1, timeout)) do
        one_by_one(
          serving,
          &Worker.each(table, [&1], fn worker -> Worker.restart(worker, timeout) end)
        )
      end
    end)
  end

  def restart(engine, index, options) do
    operate(engine, options, fn table, timeout ->
      with :ok <- check_index(table, index),
           do: Worker.each(table, [index], &Worker.restart(&1, timeout))
    end)
  end

  @doc "See `VLLM.reload/3`."
  def reload(engine, new_options, options) do
    operate(engine, options, fn table, timeout ->
      replicas = Table.replicas(table)

      with {:ok, new} <- Config.merge(Table.config(table), new_options),
           :ok <- Config.check_replicas(new, replicas),
           :ok <- reload_each(table, Enum.to_list(1..replicas), [], new, timeout) do
        Table.put_config(table, new)
        :ok
      end
    end)
  end

  defp reload_each(_table, [], _done, _new, _timeout), do: :ok

  defp reload_each(table, [index | rest], done, new, timeout) do
    old = Table.config(table, index)

    case reload_one(table, index, new, timeout) do
      :ok ->
        reload_each(table, rest, [{index, old} | done], new, timeout)

      {:error, error} ->
        for {index, old} <- done, do: reload_one(table, index, old, timeout)
        {:error, error}
    end
  end

  defp reload_one(table, index, config, timeout) do
    case Table.status(table, index) do
      # It stays at rest and uses them when it is started.
      :drained -> Worker.each(table, [index], &Worker.configure(&1, config))
      :ready -> reload_serving(table, index, config, timeout)
      _serves_nobody -> begin_anew(table, index, config, timeout)
    end
  end

  defp begin_anew(table, index, config, timeout),
    do: Worker.each(table, [index], &Worker.restart(&1, timeout, config))

  # The only replica serves on until another is ready beside it, or has refused.
  # Where there is no room for both, it has to make some first.
  defp reload_serving(table, index, config, timeout) do
    with 1 <- Table.replicas(table),
         {:error, %Error{reason: reason} = error} when reason != :out_of_memory <-
           replace(table, index, config, timeout) do
      {:error, error}
    else
      :ok -> :ok
      _others_serve_or_no_room -> begin_anew(table, index, config, timeout)
    end
  end

  defp replace(table, index, config, timeout) do
    beside = {:beside, index}
    # Left over if an earlier reload was killed.
    remove(table, beside)
    child = make_ref()
    Table.put_child(table, beside, child)
    Table.put_config(table, beside, config)
    spec = Worker.child_spec({table, child})
    {:ok, _} = Supervisor.start_child(Table.workers_supervisor(table), spec)

    case Worker.each(table, [beside], &Worker.await/1) do
      :ok ->
        _ = Worker.each(table, [index], &Worker.drain(&1, timeout))
        remove(table, index)
        Worker.each(table, [beside], &Worker.take_place/1)

      {:error, error} ->
        remove(table, beside)
        {:error, error}
    end
  end

  defp remove(table, slot) do
    supervisor = Table.workers_supervisor(table)
    child = Table.child(table, slot)
    _ = Supervisor.terminate_child(supervisor, child)
    _ = Supervisor.delete_child(supervisor, child)
    Table.forget(table, slot)
  end

  defp operate(engine, options, operation) do
    with {:ok, %{timeout: timeout}} <- Options.only(options, Options.drain()),
         {:ok, table, _pid} <- Table.lookup(engine) do
      Control.operate(table, fn -> operation.(table, timeout) end)
    end
  end

  defp check_count(count) when is_integer(count) and count > 0, do: :ok

  defp check_count(count),
    do: invalid("replicas", "An engine has at least one replica; got #{Secrets.inspect(count)}.")

  defp check_index(table, index) do
    if index in 1..Table.replicas(table),
      do: :ok,
      else:
        invalid(
          "replica",
          "There is no replica #{Secrets.inspect(index)}; there are 1 to #{Table.replicas(table)}."
        )
  end

  defp invalid(option, message),
    do: {:error, Error.new(:invalid_option, message, %{"option" => option})}

  defp one_by_one(indexes, function) do
    Enum.reduce_while(indexes, :ok, fn index, :ok ->
      case function.(index) do
        :ok -> {:cont, :ok}
        error -> {:halt, error}
      end
    end)
  end
end
