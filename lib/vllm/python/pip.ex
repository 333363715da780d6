defmodule VLLM.Python.Pip do
  @moduledoc false
  # What pip's output means: progress while it runs, the reason when it fails.

  @type event :: {:package, String.t()} | :installing | nil

  @doc """
  The progress that a line of output tells.

      iex> VLLM.Python.Pip.event("Collecting anyio==4.16.0 (from -r cpu.txt (line 9))")
      {:package, "anyio 4.16.0"}

      iex> VLLM.Python.Pip.event("Processing /srv/wheels/jinja2-3.1.6-py3-none-any.whl")
      {:package, "jinja2 3.1.6"}

      iex> VLLM.Python.Pip.event("Installing collected packages: anyio, idna")
      :installing

  """
  @spec event(String.t()) :: event()
  def event("Collecting " <> rest), do: package(rest)
  def event("Requirement already satisfied: " <> rest), do: package(rest)
  def event("Installing collected packages: " <> _), do: :installing

  def event("Processing " <> rest) do
    case rest |> String.split(" ") |> hd() |> Path.basename() |> String.split("-") do
      [name, version, _ | _] -> {:package, "#{name} #{version}"}
      _ -> nil
    end
  end

  def event(_line), do: nil

  defp package(text) do
    case Regex.run(~r/^([\w.-]+)==([^\s;]+)/, text) do
      [_, name, version] -> {:package, "#{name} #{version}"}
      nil -> nil
    end
  end

  # The first cause that matches counts. A lost network makes pip say that there
  # is no such version too, so it is asked for first.
  @causes [
    disk: ~r/No space left on device|Disk quota exceeded/,
    memory: ~r/MemoryError|Cannot allocate memory/,
    permission: ~r/Permission denied|Read-only file system/,
    certificate: ~r/CERTIFICATE_VERIFY_FAILED|certificate verify failed/i,
    network:
      ~r/name resolution|NameResolutionError|NewConnectionError|Failed to establish a new connection|Max retries exceeded|ConnectTimeoutError|ReadTimeoutError|ProxyError|Connection (refused|reset|aborted)|Network is unreachable|IncompleteRead/,
    compiler: ~r/No CMAKE_C(XX)?_COMPILER could be found/,
    version: ~r/No matching distribution found for|Could not find a version that satisfies/
  ]

  @type cause ::
          :disk
          | :memory
          | :permission
          | :certificate
          | :network
          | :compiler
          | :version
          | :unknown

  @doc """
  Why pip failed, from all that it said.

      iex> VLLM.Python.Pip.cause(["ERROR: No matching distribution found for torch==2.13.0+cpu"])
      :version

  """
  @spec cause([String.t()]) :: cause()
  def cause(lines) do
    Enum.find_value(@causes, :unknown, fn {cause, pattern} ->
      if Enum.any?(lines, &(&1 =~ pattern)), do: cause
    end)
  end

  @doc "What was not found, where that was the cause."
  @spec missing([String.t()]) :: String.t() | nil
  def missing(lines) do
    Enum.find_value(lines, fn line ->
      case Regex.run(~r/No matching distribution found for (\S+)/, line) do
        [_, requirement] -> requirement
        nil -> nil
      end
    end)
  end

  @doc """
  The lines that may be shown: those with an address could have a password in it.
  """
  @spec printable([String.t()]) :: [String.t()]
  def printable(lines), do: Enum.reject(lines, &String.contains?(&1, "://"))
end
