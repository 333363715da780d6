defmodule VLLM.Job.Source do
  @moduledoc false
  # Whether the model that a job is made of is still the same.

  alias VLLM.Error

  # Bytes at both ends of a large file that are looked at. What is between them is told by its time.
  @ends 65_536

  @doc "A text that changes with the files of a folder, or with a file."
  @spec fingerprint(Path.t()) :: {:ok, String.t()} | {:error, Error.t()}
  def fingerprint(path) do
    hash =
      Enum.reduce(files(path), :crypto.hash_init(:sha256), &:crypto.hash_update(&2, look(&1)))

    {:ok, hash |> :crypto.hash_final() |> Base.encode16(case: :lower) |> binary_part(0, 16)}
  rescue
    error in File.Error ->
      {:error, changed(path, " (#{Exception.message(error)})")}
  end

  # Those of subfolders, too.
  defp files(path) do
    if File.dir?(path),
      do: path |> Path.join("**") |> Path.wildcard() |> Enum.filter(&File.regular?/1),
      else: [path]
  end

  defp look(file) do
    %{size: size, mtime: changed} = File.stat!(file, time: :posix)
    :erlang.term_to_binary({Path.basename(file), size, changed, ends(file, size)})
  end

  defp ends(file, size) do
    File.open!(file, [:read, :raw, :binary], fn io ->
      {:ok, parts} = :file.pread(io, [{0, @ends}, {max(size - @ends, 0), @ends}])
      Enum.map(parts, &if(&1 == :eof, do: "", else: &1))
    end)
  end

  @doc "Whether the files at a path still have this fingerprint."
  @spec unchanged(Path.t(), String.t()) :: :ok | {:error, Error.t()}
  def unchanged(path, fingerprint) do
    case fingerprint(path) do
      {:ok, ^fingerprint} -> :ok
      {:ok, _other} -> {:error, changed(path)}
      {:error, error} -> {:error, error}
    end
  end

  @doc "The error for a model that is not what it was when the job began."
  @spec changed(Path.t(), String.t()) :: Error.t()
  def changed(path, how \\ "") do
    message =
      "The files of #{path} have changed since the job began#{how}. What was finished before is of " <>
        "the model as it was. Start a new job, under another name, once the model stays as it is."

    Error.new(:source_changed, message, %{"path" => path})
  end
end
