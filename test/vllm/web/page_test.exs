defmodule VLLM.Web.PageTest do
  # What can be said of the dashboard's bundle without a browser; web/test/run drives it in one.
  use ExUnit.Case, async: true

  alias VLLM.Web.{Routes, Schemas}

  @folder Path.expand("../../../priv/web", __DIR__)
  @source Path.expand("../../../web", __DIR__)

  defp page, do: File.read!(Path.join(@folder, "index.html"))

  defp files(pattern),
    do: for(path <- Path.wildcard(Path.join(@folder, pattern)), do: {path, File.read!(path)})

  test "the bundle is built from the sources that are here" do
    {digest, 0} = System.cmd(Path.join(@source, "sources"), [])

    assert File.read!(Path.join(@folder, "sources.sha256")) == digest,
           "web/build makes the page anew"
  end

  test "what the page asks for is served" do
    scripts =
      for path <- Path.wildcard(Path.join(@source, "src/**/*.{ts,tsx}")), do: File.read!(path)

    paths =
      for script <- scripts,
          [path] <- Regex.scan(~r/["`](api\/v1\/[^"`?]+)/, script, capture: :all_but_first),
          uniq: true,
          do: String.replace(path, ~r/\$\{[^}]+\}/, "some")

    assert length(paths) > 10
    for path <- paths, do: assert(Routes.match("/" <> path) != [], path)
  end

  test "what the page reads is answered" do
    answers = Schemas.answers()
    types = File.read!(Path.join(@source, "src/types.ts"))

    for {type, answer} <- [
          {"Engine", answers[:EngineState]},
          {"Replica", answers[:EngineState].properties.replicas.items},
          {"Job", answers[:JobState]},
          {"JobOutput", answers[:JobState].properties.outputs.items},
          {"Model", answers[:Models].properties.models.items},
          {"Format", answers[:Formats].properties.formats.items},
          {"OutputEstimate", answers[:JobEstimate].properties.estimates.items}
        ] do
      [_, fields] =
        Regex.run(~r/^export interface #{type} (?:extends \w+ )?\{\n(.*?)^\}/ms, types)

      read = for [_, name] <- Regex.scan(~r/^  (\w+):/m, fields), do: name
      assert length(read) > 2
      assert read -- Enum.map(Map.keys(answer.properties), &Atom.to_string/1) == [], type
    end
  end

  test "all that the page names is there, beside it" do
    named = Regex.scan(~r/(?:src|href)="([^"]+)"/, page(), capture: :all_but_first)
    assert length(named) == 3

    for [name] <- named do
      assert "./" <> path = name
      assert File.regular?(Path.join(@folder, path)), name
    end
  end

  test "the page has no script and no style of its own, which its security policy forbids" do
    assert [[""]] =
             Regex.scan(~r/<script[^>]*src=[^>]*>(.*?)<\/script>/s, page(),
               capture: :all_but_first
             )

    assert length(Regex.scan(~r/<script/, page())) == 1
    refute page() =~ ~r/<style|\sstyle=|\son\w+=/i
  end

  test "nothing in it names another host, and no code is made of texts" do
    for {path, text} <- files("**/*.{html,js,css,svg}") do
      hosts =
        Regex.scan(~r/(?:https?:)?\/\/([a-z0-9-]+(?:\.[a-z0-9-]+)+)/i, text,
          capture: :all_but_first
        )

      assert Enum.uniq(hosts) -- [["www.w3.org"]] == [], path
      refute text =~ ~r{\beval\(|new Function\(}, path
    end
  end

  test "its scripts are small" do
    assert [{_path, script}] = files("assets/*.js")
    assert byte_size(script) < 150 * 1024
  end
end
