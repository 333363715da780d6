defmodule VLLM.Shipped do
  @moduledoc """
  What of this repository has to be wherever the library runs, besides its own code.
  """

  @root Path.expand("../..", __DIR__)

  @doc """
  The files of `priv` and of the Python side that git tracks, without the tests, as their paths in
  the repository.
  """
  @spec files() :: [Path.t()]
  def files do
    {output, 0} = System.cmd("git", ["ls-files", "priv", "python"], cd: @root)
    for path <- String.split(output, "\n", trim: true), not tests?(path), do: path
  end

  defp tests?(path), do: String.starts_with?(path, "python/tests/")

  @doc "The files that `mix hex.build` packs, as their paths in the repository."
  @spec packed() :: [Path.t()]
  def packed do
    package = Mix.Project.config()[:package]

    package[:files]
    |> Enum.flat_map(&Path.wildcard(Path.join(@root, &1), match_dot: true))
    |> Enum.flat_map(&below/1)
    |> Enum.map(&Path.relative_to(&1, @root))
    |> Enum.reject(fn path -> Enum.any?(package[:exclude_patterns], &(path =~ &1)) end)
  end

  # Hex looks into folders, and packs a link as what it is.
  defp below(path) do
    case File.lstat!(path).type do
      :directory -> path |> File.ls!() |> Enum.flat_map(&below(Path.join(path, &1)))
      _ -> [path]
    end
  end
end
