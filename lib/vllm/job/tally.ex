defmodule VLLM.Job.Tally do
  @moduledoc false
  # What is known in memory of the jobs of this BEAM that have not ended: their
  # records, newer than on the disk, and the sessions of their workers. The table
  # belongs to VLLM.Job.Queue; runners write to it themselves.

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
