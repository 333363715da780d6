defmodule VLLM.Real.ProjectTest do
  # An application that has this library as a path dependency, run by mix and as
  # a release: the Python side must be found in both.
  use ExUnit.Case

  alias VLLM.DemoModel

  @moduletag :slow
  @moduletag :tmp_dir
  @moduletag timeout: 600_000

  @library Path.expand("../..", __DIR__)

  setup %{tmp_dir: dir} do
    File.mkdir_p!(Path.join(dir, "lib"))

    File.write!(Path.join(dir, "mix.exs"), """
    defmodule Host.MixProject do
      use Mix.Project

      def project do
        [app: :host, version: "1.0.0", deps: [{:ex_vllm, path: #{inspect(@library)}}]]
      end

      def application, do: [extra_applications: [:logger]]
    end
    """)

    File.write!(Path.join(dir, "lib/host.ex"), """
    defmodule Host do
      def main do
        {:ok, _} = Application.ensure_all_started(:ex_vllm)
        Logger.configure(level: :warning)
        options = #{inspect(Keyword.delete(DemoModel.options(), :name))}
        llm = VLLM.llm!(#{inspect(DemoModel.path())}, options)
        [output] = VLLM.generate!(llm, #{inspect(prompt())}, temperature: 0.0, max_tokens: 64)
        IO.puts("It says:" <> VLLM.text(output))
        VLLM.stop(llm)
      end
    end
    """)

    :ok
  end

  defp prompt, do: elem(hd(DemoModel.facts()), 0)
  defp completion, do: elem(hd(DemoModel.facts()), 1)

  defp run(dir, program, args) do
    {output, status} =
      System.cmd(program, args, cd: dir, env: [{"MIX_ENV", "prod"}], stderr_to_stdout: true)

    assert status == 0, output
    output
  end

  test "both generate", %{tmp_dir: dir} do
    assert run(dir, "mix", ["run", "-e", "Host.main()"]) =~ "It says:" <> completion()

    run(dir, "mix", ["release", "--quiet"])
    [priv] = Path.wildcard(Path.join(dir, "_build/prod/rel/host/lib/ex_vllm-*/priv"))

    for path <- VLLM.Shipped.files() do
      path = String.replace_prefix(path, "priv/", "")
      assert File.regular?(Path.join(priv, path)) or path == "python", path
    end

    # The release stands alone: what it was built from is gone.
    File.rm_rf!(Path.join(dir, "lib"))
    release = Path.join(dir, "_build/prod/rel/host/bin/host")
    assert run(dir, release, ["eval", "Host.main()"]) =~ "It says:" <> completion()
  end
end
