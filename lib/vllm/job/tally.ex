defmodule VLLM.Job.Tally do
  @moduledoc false
  # What is known in memory of the jobs of this BEAM that have not ended: their
  # records, newer than on the disk, and the sessions of their workers; and how
  # many have ended, and how. The table belongs to VLLM.Job.Queue; runners write
  # to it themselves.

  alias VLLM.Job.Record

  @doc "The table, of the calling process."
  @spec new() :: :ok
  def new do
    _ = :ets.new(__MODULE__, [:named_table, :public])
    :ok
  end

  @doc "Notes a record as it is now."
  @spec update(Record.t()) :: :ok
  def update(record), do: insert({{:record, record.id}, record})

  @doc "The record of a job; nil where it does not run here."
  @spec record(String.t()) :: Record.t() | nil
  def record(id), do: lookup({:record, id})

  @doc "The record as it is now."
  @spec of(Record.t()) :: Record.t()
  def of(record), do: record(record.id) || record

  @doc "Notes which session a job has, or nil."
  @spec session(String.t(), pid() | nil) :: :ok
  def session(id, pid), do: insert({{:session, id}, pid})

  @doc "The session of a job's worker; nil where there is none."
  @spec session(String.t()) :: pid() | nil
  def session(id), do: lookup({:session, id})

  @doc "Counts the end of a job."
  @spec count_end(Record.t()) :: :ok
  def count_end(%Record{kind: kind, state: state}) do
    _ = :ets.update_counter(__MODULE__, {:ended, {kind, state}}, 1, {nil, 0})
    :ok
  end

  @doc "How many jobs there are of each kind in each state: those that have not ended, and those that have."
  @spec counts() :: %{now: counts, ended: counts}
        when counts: %{{atom(), atom()} => pos_integer()}
  def counts do
    records = :ets.select(__MODULE__, [{{{:record, :_}, :"$1"}, [], [:"$1"]}])

    %{
      now: records |> Enum.reject(&Record.ended?/1) |> Enum.frequencies_by(&{&1.kind, &1.state}),
      ended:
        __MODULE__
        |> :ets.select([{{{:ended, :"$1"}, :"$2"}, [], [{{:"$1", :"$2"}}]}])
        |> Map.new()
    }
  rescue
    # Jobs are being stopped.
    ArgumentError -> %{now: %{}, ended: %{}}
  end

  @doc "Forgets a job: the disk has all that is known of it."
  @spec forget(String.t()) :: :ok
  def forget(id) do
    :ets.delete(__MODULE__, {:record, id})
    :ets.delete(__MODULE__, {:session, id})
    :ok
  rescue
    # Jobs are being stopped.
    ArgumentError -> :ok
  end

  defp insert(entry) do
    :ets.insert(__MODULE__, entry)
    :ok
  rescue
    ArgumentError -> :ok
  end

  defp lookup(key) do
    case :ets.lookup(__MODULE__, key) do
      [{^key, value}] -> value
      [] -> nil
    end
  rescue
    ArgumentError -> nil
  end
end
