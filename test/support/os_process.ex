defmodule VLLM.OSProcess do
  @moduledoc "Looks at and ends processes of the operating system."

  @doc "Sends a signal to one process; `kill` from coreutils' relative, given a positive pid only."
  def signal(name, pid) when is_integer(pid) and pid > 1 do
    {_, status} =
      System.cmd("kill", ["-" <> name, Integer.to_string(pid)], stderr_to_stdout: true)

    status == 0
  end

  @doc "Whether the process runs (a zombie does not)."
  def alive?(pid) do
    case File.read("/proc/#{pid}/stat") do
      {:ok, stat} -> state(stat) not in ["Z", "X"]
      {:error, _} -> false
    end
  end

  @doc "The command line of a process, its arguments parted by NULs; empty if it is gone."
  def command(pid) do
    case File.read("/proc/#{pid}/cmdline") do
      {:ok, command} -> command
      {:error, _} -> ""
    end
  end

  @doc "The children of a process."
  def children(pid), do: for({child, ^pid} <- parents(), do: child)

  @doc "All descendants of a process; of 0, which stands for none and has everybody below it, none."
  def descendants(0), do: []
  def descendants(pid), do: collect([pid], parents(), [])

  defp parents do
    for entry <- File.ls!("/proc"),
        {child, ""} <- [Integer.parse(entry)],
        {:ok, stat} <- [File.read("/proc/#{entry}/stat")] do
      {child, parent(stat)}
    end
  end

  defp collect([], _parents, found), do: found

  defp collect([pid | rest], parents, found) do
    children = for {child, ^pid} <- parents, do: child
    collect(rest ++ children, parents, found ++ children)
  end

  # The name in parentheses may hold spaces and parentheses.
  defp fields(stat), do: stat |> String.split(") ") |> List.last() |> String.split(" ")
  defp state(stat), do: hd(fields(stat))
  defp parent(stat), do: stat |> fields() |> Enum.at(1) |> String.to_integer()

  @doc "Returns true once `fun` does, false if it has not within `timeout` ms."
  def eventually(fun, timeout \\ 60_000) do
    deadline = System.monotonic_time(:millisecond) + timeout
    poll(fun, deadline)
  end

  # The operating system tells the end of a process only to its parent.
  defp poll(fun, deadline) do
    cond do
      fun.() ->
        true

      System.monotonic_time(:millisecond) > deadline ->
        false

      true ->
        receive do
        after
          10 -> poll(fun, deadline)
        end
    end
  end
end
