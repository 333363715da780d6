defmodule VLLM.Job.Owner do
  @moduledoc false
  # Which BEAM runs a job: told by its process, so that another BEAM that shares
  # the data folder can tell a job that runs from one that was cut off.

  @doc "This BEAM."
  @spec this() :: %{String.t() => String.t()}
  def this do
    pid = System.pid()
    %{"pid" => pid, "started" => started(pid), "boot" => boot()}
  end

  @doc "Whether a job of this owner may be running."
  @spec alive?(map() | nil) :: boolean()
  def alive?(%{"pid" => pid, "started" => started, "boot" => boot}) when is_binary(pid) do
    # A number is given to another process some day, but not with the same time.
    boot == boot() and started != nil and pid =~ ~r/\A\d+\z/ and started(pid) == started
  end

  def alive?(_none), do: false

  # In ticks since the machine was started; see proc(5). The name before it, in parentheses, may
  # hold anything.
  defp started(pid) do
    with {:ok, stat} <- File.read("/proc/#{pid}/stat") do
      stat |> String.split(") ") |> List.last() |> String.split(" ") |> Enum.at(19)
    else
      {:error, _gone} -> nil
    end
  end

  defp boot do
    case File.read("/proc/sys/kernel/random/boot_id") do
      {:ok, id} -> String.trim(id)
      {:error, _} -> ""
    end
  end
end
