defmodule VLLM.Job.Store do
  @moduledoc false
  # Jobs on the disk: a folder for each.
  #
  #     job      the record, replaced as a whole: it is written beside it, flushed and renamed
  #     log      what the steps have printed, and before it `log.1`; bounded
  #     keep/    what a retry goes on from, such as the checkpoints of a training
  #     tmp/     what steps work in; it is there while the job runs only
  #     cancel   there once another BEAM than the one that runs it wants it to end

  require Logger

  alias VLLM.{Data, Error}
  alias VLLM.Job.{Owner, Record}

  # Bytes of a log before it is begun anew.
  @log_limit 1024 * 1024

  ## Records

  @doc "Keeps a record. Whoever reads it at the same time reads it as it was or as it is."
  @spec write(Record.t()) :: :ok | {:error, Error.t()}
  def write(%Record{id: id} = record) do
    folder = Data.jobs(id)
    path = Path.join(folder, "job")
    # Of its own, because a BEAM that was killed may have left one.
    draft = "#{path}.#{Base.url_encode64(:rand.bytes(6))}"

    with :ok <- File.mkdir_p(folder),
         :ok <- flushed(draft, Record.encode(record)),
         :ok <- File.rename(draft, path) do
      # The name is on the disk once the folder is, where the file system can be asked for that.
      _ = flush(folder, [:read, :raw, :directory])
      :ok
    else
      {:error, reason} ->
        _ = File.rm(draft)
        {:error, not_written(folder, reason)}
    end
  end

  defp flushed(path, bytes) do
    with {:ok, file} <- :file.open(path, [:write, :exclusive, :raw, :binary]) do
      written = with :ok <- :file.write(file, bytes), do: :file.sync(file)
      closed = :file.close(file)
      with :ok <- written, do: closed
    end
  end

  defp flush(path, modes) do
    with {:ok, file} <- :file.open(path, modes) do
      _ = :file.sync(file)
      :file.close(file)
    end
  end

  @doc "The error for a folder of ours that cannot be written to."
  @spec not_written(Path.t(), File.posix()) :: Error.t()
  def not_written(folder, reason) when reason in [:enospc, :edquot] do
    message =
      "The disk with #{folder} is full. Make room, then retry the job: what was finished is kept."

    Error.new(:disk_full, message, %{"path" => folder})
  end

  def not_written(folder, reason) do
    message =
      "#{folder} cannot be written to (#{:file.format_error(reason)}). Give it to the user that " <>
        "runs the application, or name another folder: `config :ex_vllm, data_dir: \"…\"`."

    Error.new(:cache_not_writable, message, %{"path" => folder})
  end

  @doc "The record of a job; one that was cut off is `:interrupted`, whatever its file says."
  @spec read(String.t()) :: {:ok, Record.t()} | {:error, Error.t()}
  def read(id) do
    with true <- Record.id?(id),
         {:ok, bytes} <- File.read(Path.join(Data.jobs(id), "job")),
         {:ok, %{id: ^id} = record} <- Record.decode(bytes) do
      {:ok, settled(record)}
    else
      _none -> {:error, not_found(id)}
    end
  end

  defp settled(record) do
    if Record.ended?(record) or Owner.alive?(record.owner),
      do: record,
      else: Record.interrupted(record)
  end

  @doc "The error for a job that there is none of."
  @spec not_found(term()) :: Error.t()
  def not_found(id) do
    message = "There is no job #{inspect(id)}. `VLLM.Job.list/0` tells those that there are."
    Error.new(:job_not_found, message, %{"job" => if(is_binary(id), do: id)})
  end

  @doc "The records of all jobs that can be read, oldest first."
  @spec list() :: [Record.t()]
  def list, do: for(id <- ids(), {:ok, record} <- [read(id)], do: record)

  defp ids do
    case File.ls(Data.jobs()) do
      {:ok, names} -> names |> Enum.filter(&Record.id?/1) |> Enum.sort()
      {:error, _none} -> []
    end
  end

  @doc "Removes a job from the disk, but not what came of it."
  @spec delete(String.t()) :: :ok | {:error, Error.t()}
  def delete(id) do
    folder = Data.jobs(id)
    # The record first: a job whose folder is half removed is none.
    _ = File.rm(Path.join(folder, "job"))

    case File.rm_rf(folder) do
      {:ok, _paths} -> :ok
      {:error, reason, _path} -> {:error, not_written(folder, reason)}
    end
  end

  ## Folders

  @doc "The folder in which the steps of a job work."
  @spec tmp(String.t()) :: Path.t()
  def tmp(id), do: Path.join(Data.jobs(id), "tmp")

  @doc "The folder of what a retry goes on from."
  @spec keep(String.t()) :: Path.t()
  def keep(id), do: Path.join(Data.jobs(id), "keep")

  @doc "Makes the folder for steps, empty."
  @spec open_tmp(String.t()) :: :ok | {:error, Error.t()}
  def open_tmp(id) do
    clean(id)
    with {:error, reason} <- File.mkdir_p(tmp(id)), do: {:error, not_written(tmp(id), reason)}
  end

  # In a model that a job has made: the job's id. Nobody uploads hidden files.
  @maker ".job"

  @doc """
  Gives what the job `id` has made its place, at once and as a whole. It may be there already, from a
  try that was cut off.
  """
  @spec publish(String.t(), Path.t(), Path.t()) :: {:ok, Path.t()} | {:error, Error.t()}
  def publish(id, from, to) do
    if published?(id, to) do
      {:ok, to}
    else
      with :ok <- File.write(Path.join(from, @maker), id),
           :ok <- File.mkdir_p(Path.dirname(to)),
           # The system refuses it where something is, whoever came first.
           :ok <- File.rename(from, to) do
        _ = flush(Path.dirname(to), [:read, :raw, :directory])
        {:ok, to}
      else
        {:error, reason} when reason in [:eexist, :enotempty, :enotdir] -> {:error, taken(to)}
        {:error, reason} -> {:error, not_written(Path.dirname(to), reason)}
      end
    end
  end

  defp taken(path) do
    message =
      "#{path} is there already: another job has made it meanwhile. Delete it, or start a job " <>
        "under another `name:`."

    Error.new(:name_taken, message, %{"path" => path})
  end

  @doc "Whether what is at a place among the models was made by the job `id`."
  @spec published?(String.t(), Path.t()) :: boolean()
  def published?(id, path), do: File.read(Path.join(path, @maker)) == {:ok, id}

  @doc "Removes what only a running job has."
  @spec clean(String.t()) :: :ok
  def clean(id) do
    _ = File.rm_rf(tmp(id))
    _ = File.rm(cancel_file(id))
    :ok
  end

  @doc "Removes what a retry would go on from: of a job that is done."
  @spec drop_kept(String.t()) :: :ok
  def drop_kept(id) do
    _ = File.rm_rf(keep(id))
    :ok
  end

  @doc """
  Ends what BEAMs that were killed have left, and what `owner` has, who runs nothing now: their jobs
  are interrupted, their folders and drafts removed. Files that cannot be read are set aside, and it
  is said so.
  """
  @spec sweep(map()) :: :ok
  def sweep(owner), do: Enum.each(ids(), &sweep(&1, owner))

  defp sweep(id, owner) do
    path = Path.join(Data.jobs(id), "job")

    case File.read(path) do
      {:ok, bytes} -> sweep(id, owner, path, Record.decode(bytes))
      # Its BEAM was killed while it made or deleted it.
      {:error, :enoent} -> if stale?(Data.jobs(id)), do: File.rm_rf(Data.jobs(id))
      {:error, _reason} -> :ok
    end
  end

  defp sweep(id, owner, _path, {:ok, %{id: id} = record}) do
    unless Record.ended?(record) or (Owner.alive?(record.owner) and record.owner != owner) do
      clean(id)
      for draft <- Path.wildcard(Path.join(Data.jobs(id), "job.*")), do: File.rm(draft)

      with {:error, error} <- write(Record.interrupted(record)), do: Logger.warning(error.message)
    end

    :ok
  end

  defp sweep(id, _owner, path, :newer) do
    Logger.warning(
      "The job #{id} was made by a newer version of ex_vllm and is not listed: #{path}"
    )
  end

  defp sweep(id, _owner, path, _damaged) do
    aside = path <> "-damaged"
    clean(id)
    _ = File.rename(path, aside)
    Logger.warning("The file of the job #{id} is damaged. It is not listed any more: #{aside}")
  end

  # A folder that another BEAM may be making right now is left alone.
  defp stale?(folder) do
    case {File.ls(folder), File.stat(folder, time: :posix)} do
      {{:ok, names}, {:ok, %{mtime: changed}}} ->
        not Enum.any?(names, &(&1 == "job-damaged")) and System.os_time(:second) - changed > 60

      _gone ->
        false
    end
  end

  ## Cancelling from elsewhere

  @doc "Asks the BEAM that runs a job to end it."
  @spec request_cancel(String.t()) :: :ok | {:error, Error.t()}
  def request_cancel(id) do
    with {:error, reason} <- File.write(cancel_file(id), ""),
         do: {:error, not_written(Data.jobs(id), reason)}
  end

  @doc "Whether that was asked."
  @spec cancel_requested?(String.t()) :: boolean()
  def cancel_requested?(id), do: File.exists?(cancel_file(id))

  defp cancel_file(id), do: Path.join(Data.jobs(id), "cancel")

  ## Logs

  @doc "Adds lines to the log of a job."
  @spec log(String.t(), [String.t()]) :: :ok
  def log(id, lines) do
    path = log_file(id)

    with {:ok, %{size: size}} when size > @log_limit <- File.stat(path),
         do: File.rename(path, path <> ".1")

    # A disk that is full is told of by the job itself.
    _ = File.write(path, Enum.map(lines, &[&1, "\n"]), [:append])
    :ok
  end

  @doc "The lines of the log of a job, oldest first."
  @spec read_log(String.t()) :: [String.t()]
  def read_log(id) do
    for path <- [log_file(id) <> ".1", log_file(id)],
        {:ok, text} <- [File.read(path)],
        line <- String.split(text, "\n", trim: true),
        do: line
  end

  defp log_file(id), do: Path.join(Data.jobs(id), "log")
end
