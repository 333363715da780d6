defmodule VLLM.Bridge.Log do
  @moduledoc false
  # Follows the log of a run folder, to which the guard writes what the worker
  # and its children print. The guard keeps it small: at a limit it renames
  # `log` to `log.1` and begins anew.

  @enforce_keys [:path]
  defstruct [:path, inode: nil, offset: 0, rest: "", recent: []]

  @type t :: %__MODULE__{}

  # Lines that the error of a dead worker shows.
  @recent 40

  @spec new(Path.t()) :: t()
  def new(run_dir), do: %__MODULE__{path: Path.join(run_dir, "log")}

  @doc "The lines that have been written since the last call."
  @spec read(t()) :: {[String.t()], t()}
  def read(%__MODULE__{} = log) do
    {bytes, log} = read_new(log)
    # A progress bar returns the carriage and overwrites its line.
    {lines, [rest]} = (log.rest <> bytes) |> String.split(["\r\n", "\n", "\r"]) |> Enum.split(-1)
    lines = lines |> Enum.map(&plain/1) |> Enum.reject(&(String.trim(&1) == ""))
    recent = Enum.take(Enum.reverse(lines) ++ log.recent, @recent)
    {lines, %{log | rest: rest, recent: recent}}
  end

  @doc "The last lines, oldest first."
  @spec recent(t()) :: [String.t()]
  def recent(%__MODULE__{recent: recent}), do: Enum.reverse(recent)

  # Of a file so many bytes are looked at for its last lines.
  @tail 512 * 1024

  @doc "The last `count` lines of the log in a run folder, oldest first, whoever follows it."
  @spec tail(Path.t(), pos_integer()) :: [String.t()]
  def tail(run_dir, count) do
    path = Path.join(run_dir, "log")

    for(file <- [path <> ".1", path], {:ok, %{size: size}} <- [File.stat(file)], do: {file, size})
    |> Enum.map_join(fn {file, size} -> read_from(file, max(size - @tail, 0), size) end)
    |> String.split(["\r\n", "\n", "\r"])
    |> Enum.map(&plain/1)
    |> Enum.reject(&(String.trim(&1) == ""))
    |> Enum.take(-count)
  end

  defp read_new(log) do
    case File.stat(log.path) do
      {:ok, %{inode: inode, size: size}} when inode == log.inode or log.inode == nil ->
        {read_from(log.path, log.offset, size), %{log | inode: inode, offset: size}}

      {:ok, %{inode: inode, size: size}} ->
        old = log.path <> ".1"

        rotated =
          case File.stat(old) do
            {:ok, %{inode: same, size: end_of_old}} when same == log.inode ->
              read_from(old, log.offset, end_of_old)

            _ ->
              ""
          end

        {rotated <> read_from(log.path, 0, size), %{log | inode: inode, offset: size}}

      {:error, _} ->
        {"", log}
    end
  end

  defp read_from(_path, offset, size) when size <= offset, do: ""

  defp read_from(path, offset, size) do
    with {:ok, file} <- :file.open(path, [:read, :raw, :binary]) do
      bytes = :file.pread(file, offset, size - offset)
      :ok = :file.close(file)

      case bytes do
        {:ok, bytes} -> bytes
        _ -> ""
      end
    else
      _ -> ""
    end
  end

  # Colours of a terminal, and bytes that are no text, have no place in a log.
  defp plain(line) do
    line = if String.valid?(line), do: line, else: printable(line)
    Regex.replace(~r/\e\[[0-9;]*[A-Za-z]/, line, "")
  end

  defp printable(line), do: for(<<byte <- line>>, byte in 32..126, into: "", do: <<byte>>)

  @doc """
  The Logger level of a line.

  vLLM writes `(EngineCore pid=7) WARNING 11-20 19:02:41 [file.py:12] text`;
  other libraries and the interpreter have their own ways.
  """
  @spec level(String.t()) :: :debug | :info | :warning | :error
  def level(line) do
    case Regex.run(~r/^(?:\([^)]*\)\s*)?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b/, line) do
      [_, "DEBUG"] -> :debug
      [_, "INFO"] -> :info
      [_, "WARNING"] -> :warning
      [_, _error] -> :error
      nil -> if line =~ ~r/\b\w*Warning:/, do: :warning, else: :info
    end
  end
end
