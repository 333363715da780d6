defmodule VLLM.Job.Machine do
  @moduledoc false
  # What the machine has left for a step: memory and disk.

  alias VLLM.{Disk, Error}

  @cgroup "/sys/fs/cgroup"

  @doc """
  Bytes of memory that a process can still get without swapping, and how many there are in all: of
  the system, or of what the control group allows, whichever is less.
  """
  @spec memory() :: {available :: non_neg_integer(), total :: non_neg_integer()}
  def memory do
    meminfo = File.read!("/proc/meminfo")
    system = {meminfo(meminfo, "MemAvailable"), meminfo(meminfo, "MemTotal")}

    case cgroup() do
      nil -> system
      {available, total} -> {min(available, elem(system, 0)), min(total, elem(system, 1))}
    end
  end

  defp meminfo(text, name) do
    [_, kilobytes] = Regex.run(~r/^#{name}:\s+(\d+) kB/m, text)
    String.to_integer(kilobytes) * 1024
  end

  defp cgroup do
    with {:ok, limit} <- number("memory.max"), {:ok, usage} <- number("memory.current") do
      # The page cache counts as used and is given back under pressure.
      {max(limit - usage + cached(), 0), limit}
    else
      _no_limit -> nil
    end
  end

  defp number(name) do
    with {:ok, text} <- File.read(Path.join(@cgroup, name)),
         {number, _} <- Integer.parse(text),
         do: {:ok, number}
  end

  defp cached do
    with {:ok, text} <- File.read(Path.join(@cgroup, "memory.stat")),
         [_, bytes] <- Regex.run(~r/^file (\d+)$/m, text) do
      String.to_integer(bytes)
    else
      _unknown -> 0
    end
  end

  @doc "How many processes the system has killed for want of memory; nil where it does not tell."
  @spec killed() :: non_neg_integer() | nil
  def killed do
    with {:ok, text} <- File.read("/proc/vmstat"),
         [_, count] <- Regex.run(~r/^oom_kill (\d+)$/m, text) do
      String.to_integer(count)
    else
      _unknown -> nil
    end
  end

  @doc "Whether so many bytes fit on the disk with a folder."
  @spec check_disk(Path.t(), non_neg_integer()) :: :ok | {:error, Error.t()}
  def check_disk(folder, bytes) do
    case Disk.free(folder) do
      {:ok, free} when free < bytes -> {:error, disk_full(folder, bytes, free)}
      _enough_or_unknown -> :ok
    end
  end

  defp disk_full(folder, bytes, free) do
    message =
      "The disk with #{folder} has #{VLLM.Bytes.file(free)} left, and #{VLLM.Bytes.file(bytes)} are " <>
        "needed. Make room (`mix vllm.models` shows what models take), or name another folder: " <>
        "`config :ex_vllm, data_dir: \"…\"`. A retry goes on with what is not finished."

    Error.new(:disk_full, message, %{"path" => folder, "needed" => bytes, "free" => free})
  end
end
